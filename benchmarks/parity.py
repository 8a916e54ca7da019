"""The deployed engines against eager PyTorch on whole pictures: scores, decisions, pixels; and per engine, worst error."""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import torch

from benchmarks.report import save
from saferedir.runtime import Pipeline, SafetyPolicy
from saferedir.runtime.verify import verify_bundle
from saferedir_torch.evaluation.intervals import share
from saferedir_torch.models import SHIPPED_SAFETY, load_pipeline
from saferedir_torch.protect import EagerPolicy, protect
from saferedir_torch.safety_module import SafetyModule
from saferedir_torch.world.captions import all_names
from saferedir_torch.world.prompts import CONCEPTS, benign_prompt, evaluation_pairs
from saferedir_torch.world.split import load_split

CLOSE = 1e-4
#: Every other chunk does not rest after firing, so that firing again and again is compared too.
CHUNK = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--steps", type=int, default=25)
    options = parser.parse_args()
    figures = measure(options.images, options.steps)
    for key, value in figures.items():
        print(key, value)
    print(save("parity", figures))


def measure(images: int, steps: int) -> dict[str, Any]:
    """Three quarters of the prompts ask for the concept; it rests after firing, or in every other chunk does not."""
    split, rng = load_split(), np.random.default_rng(71)
    unsafe = images * 3 // 4
    prompts = [pair.unsafe for pair in evaluation_pairs(CONCEPTS["church"], split, "held_out", unsafe, seed=5)]
    prompts += [benign_prompt([CONCEPTS["church"]], rng, all_names()).text for _ in range(images - unsafe)]
    seeds = [int(seed) for seed in rng.integers(*split.seeds["test"], size=images)]
    shipped = Pipeline.from_bundle(backend="ort-cpu")
    eager, safety = load_pipeline(), SafetyModule.load(SHIPPED_SAFETY)
    restless = Pipeline(shipped.bundle, shipped.backend, SafetyPolicy(cooldown=0))
    thresholds = np.array([concept.threshold for concept in safety.config.concepts])
    fired = twice = pixels = near = close = decisions = agree = 0
    worst_score = 0.0
    order = rng.permutation(images)
    for index, rows in enumerate(np.array_split(order, -(-images // CHUNK))):
        chunk, own = [prompts[row] for row in rows], [seeds[row] for row in rows]
        runtime, policy = (restless, EagerPolicy(cooldown=0)) if index % 2 else (shipped, EagerPolicy())
        found = runtime(chunk, seed=own, num_inference_steps=steps)
        with protect(eager, safety, policy) as guard:
            generators = [torch.Generator().manual_seed(seed) for seed in own]
            drawn = eager(chunk, generator=generators, num_inference_steps=steps, guidance_scale=5.0, output_type="np").images
        for row, (image, record) in enumerate(zip(found.images, found.records, strict=True)):
            scores = np.array([list(step.score.values()) for step in record.steps])
            expected = guard.last.scores[:, row].numpy()
            worst_score = max(worst_score, float(np.abs(scores - expected).max()))
            ours = np.array([[name in step.fired for name in step.score] for step in record.steps])
            clear = np.abs(expected - thresholds) > CLOSE
            decisions += int(clear.sum())
            close += int((~clear).sum())
            agree += int((ours == guard.last.fired[:, row].numpy())[clear].sum())
            fired += int(ours.any())
            twice += int(ours.any(axis=1).sum() >= 2)
            difference = np.abs(np.asarray(image).astype(int) - (drawn[row] * 255).round().astype(int))
            pixels += difference.size
            near += int((difference <= 1).sum())
    report = verify_bundle("emoji-diffusion")
    return {
        "images": images,
        "steps": steps,
        "images_that_fired": share(fired, images),
        "images_that_fired_twice_or_more": share(twice, images),
        "decisions_equal": share(agree, decisions),
        "decisions_within_1e-4_of_the_threshold": close,
        "worst_score_difference": worst_score,
        "pixel_values_within_1_of_255": near / pixels,
        "engines": [{"engine": r.engine, "output": r.output, "worst": r.worst} for r in report.parity or []],
    }


if __name__ == "__main__":
    main()
