"""What latent and timestep add over the text: three detectors on the same data, per timestep band and kind of name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc

from saferedir_torch.estimate import shown_estimate
from saferedir_torch.evaluation.intervals import bootstrap
from saferedir_torch.learner import Learner
from saferedir_torch.new_module import new_module
from saferedir_torch.recording import RecordedRuns, record
from saferedir_torch.safety_module import SafetyModule
from saferedir_torch.train import RUNS_FILE, optimise, teach_words
from saferedir_torch.training_data import load_runs, make_pairs
from saferedir_torch.world.captions import misspell
from saferedir_torch.world.prompts import CONCEPTS, benign_set, evaluation_pairs
from saferedir_torch.world.source import WorldPrompts
from saferedir_torch.world.split import Split

BANDS = ((0, 250), (250, 500), (500, 750), (750, 1000))
STEPS = 1500
FULL, QUICK = 60, 3
INPUTS = ("text", "text + latent", "text + latent + timestep")


def train_detector(
    pipeline: StableDiffusionPipeline, split: Split, runs: Path, folder: Path, inputs: str, steps: int
) -> SafetyModule:
    """A detector of all concepts that sees `inputs` alone, trained as the shipped one is; `runs` holds recorded runs."""
    source = WorldPrompts(list(CONCEPTS), split)
    torch.manual_seed(0)
    module = new_module(pipeline, source.replacements)
    blind(module, inputs)
    pairs = make_pairs(pipeline, source, count=5000, seed=0)
    learner = Learner(module, load_runs(runs / RUNS_FILE).of(list(CONCEPTS)), pairs, pipeline.scheduler.alphas_cumprod, 0)
    module.last_branch.redirector.requires_grad_(False)
    name = inputs.replace(" + ", "_")
    optimise(module, learner.detection_of_step, folder, steps=steps, name=name)
    teach_words(module, learner, folder, name=f"{name}_words", steps=steps)
    return module


def blind(module: SafetyModule, inputs: str) -> None:
    """Put zeros in place of what the detector is not to see: the features of the latent, of the timestep, or both."""

    def hide(_: Any, __: Any, output: Tensor) -> Tensor:
        return torch.zeros_like(output)

    if "latent" not in inputs:
        module.encoder.latent.register_forward_hook(hide)
    if "timestep" not in inputs:
        module.encoder.timestep.register_forward_hook(hide)


def detection(
    pipeline: StableDiffusionPipeline, split: Split, runs: Path, folder: Path, count: int, steps: int = STEPS
) -> dict[str, Any]:
    """Balanced accuracy at 0.5 and AUROC of the three detectors on `count` unsafe test runs a concept and kind of name,
    against three times as many benign ones."""
    tests = _test_runs(pipeline, split, folder / "test-runs", count)
    figures: dict[str, Any] = {"bands": BANDS, "runs_a_concept": count, "detectors": {}}
    for inputs in INPUTS:
        module = train_detector(pipeline, split, runs, folder, inputs, steps)
        scores = {kind: _scores(module, recorded) for kind, recorded in tests.items()}
        figures["detectors"][inputs] = {
            kind: {
                "all": _accuracy(scores, kind, tests["benign"].timestep, (0, 1000)),
                **{f"{low}-{high}": _accuracy(scores, kind, tests["benign"].timestep, (low, high)) for low, high in BANDS},
            }
            for kind in ("seen", "held_out", "misspelt")
        }
    return figures


def _test_runs(pipeline: StableDiffusionPipeline, split: Split, folder: Path, count: int) -> dict[str, RecordedRuns]:
    """Unprotected test runs by kind of name, concept after concept, and benign ones."""
    rng = np.random.default_rng(85)
    concepts = list(CONCEPTS.values())
    prompts: dict[str, list[str]] = {"seen": [], "held_out": [], "misspelt": []}
    for concept in concepts:
        others = [other for other in concepts if other is not concept]
        seen = list(evaluation_pairs(concept, split, "seen", count, seed=7, avoid=others))
        prompts["seen"] += [pair.unsafe for pair in seen]
        prompts["held_out"] += [
            pair.unsafe for pair in evaluation_pairs(concept, split, "held_out", count, seed=8, avoid=others)
        ]
        prompts["misspelt"] += [pair.unsafe.replace(pair.name, misspell(pair.name, rng)) for pair in seen]
    prompts["benign"] = [prompt.text for prompt in benign_set(split, "test", count * len(concepts), seed=9)[0]]
    low, high = split.seeds["test"]
    return {
        kind: record(
            pipeline, texts, [int(seed) for seed in rng.integers(low, high, size=len(texts))],
            steps=25, guidance_scale=5.0, folder=folder / kind,
        )
        for kind, texts in prompts.items()
    }  # fmt: skip


@torch.no_grad()
def _scores(module: SafetyModule, runs: RecordedRuns) -> np.ndarray[Any, np.dtype[np.float32]]:
    """[R, S, N]."""
    parts = []
    for latent, estimate, prompt in zip(
        *(torch.split(part, 40) for part in (runs.latent, runs.denoised, runs.prompt)), strict=True
    ):
        count, steps = latent.shape[:2]
        embeds = prompt.float().repeat_interleave(steps, dim=0)
        ahead = shown_estimate(estimate.flatten(0, 1))
        score = module.score(latent.flatten(0, 1).float(), runs.timestep.repeat(count), embeds, ahead).score
        parts.append(score.reshape(count, steps, -1))
    return np.asarray(torch.cat(parts).numpy())


def _accuracy(scores: dict[str, Any], kind: str, timestep: Tensor, band: tuple[int, int]) -> dict[str, float]:
    """Over the steps in `band`, mean over concepts; the interval is a bootstrap over runs."""
    steps = ((timestep >= band[0]) & (timestep < band[1])).numpy()
    concepts = scores["benign"].shape[2]
    unsafe = np.split(scores[kind][:, steps], concepts)
    benign = scores["benign"][:, steps]
    hits = np.concatenate([(part[:, :, n] >= 0.5).mean(axis=1) for n, part in enumerate(unsafe)])
    quiet = (benign < 0.5).mean(axis=(1, 2))
    drawn = [
        bootstrap(part, ["all"] * len(part), [str(row) for row in range(len(part))], lambda values: float(values.mean()))
        for part in (hits, quiet)
    ]
    low, high = np.quantile((drawn[0] + drawn[1]) / 2, (0.025, 0.975))
    labels = torch.tensor([1] * sum(part[:, :, 0].size for part in unsafe) + [0] * benign.size)
    values = np.concatenate([*(part[:, :, n].ravel() for n, part in enumerate(unsafe)), benign.ravel()])
    return {
        "balanced_accuracy": float((hits.mean() + quiet.mean()) / 2),
        "low": float(low),
        "high": float(high),
        "found": float(hits.mean()),
        "quiet": float(quiet.mean()),
        "auroc": float(binary_auroc(torch.from_numpy(values), labels)),
    }
