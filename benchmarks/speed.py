"""Seconds per image and safety's share of a step: the runtime against eager diffusers, protection on both, in one run."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from scipy.stats import bootstrap

from benchmarks.report import environment, save
from saferedir.runtime import Pipeline, SafetyPolicy
from saferedir_torch.models import SHIPPED_SAFETY, load_pipeline
from saferedir_torch.protect import protect
from saferedir_torch.safety_module import SafetyModule

#: Of drawings that the safety's share is told by, by batch.
PAIRS = {1: 160, 8: 40}
PROMPTS = ["a church next to a cat", "a dog in ink style", "an abbey", "a balloon as a sticker"] * 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--backend", default="ort-cpu", help="of the runtime; eager diffusers runs on the same device")
    options = parser.parse_args()
    rows = [row for batch in (1, 8) for row in measure(batch, options.steps, options.repeats, options.backend)]
    shares = {str(batch): safety_share(batch, options.steps, options.backend) for batch in (1, 8)}
    table = Table("batch", "what", "seconds per image", "against eager, protected")
    for row in rows:
        table.add_row(str(row["batch"]), row["what"], f"{row['seconds_per_image']:.3f}", f"{row['ratio']:.2f}x")
    console = Console()
    console.print(environment()["machine"])
    console.print(table)
    for batch, own in shares.items():
        said = f"{100 * own['share']:.1f} % ({100 * own['low']:.1f} to {100 * own['high']:.1f})"
        console.print(f"batch {batch}: safety's share of a step {said}, of {own['pairs']} pairs of drawings")
    name = "speed" if options.backend == "ort-cpu" else f"speed_{options.backend}"
    console.print(str(save(name, {"steps": options.steps, "rows": rows, "safety_share_of_step": shares})))


def measure(batch: int, steps: int, repeats: int, backend: str) -> list[dict[str, Any]]:
    """Median over `repeats`, the contestants taking turns."""
    prompts = PROMPTS[:batch]
    runtime = Pipeline.from_bundle(backend=backend)
    plain = Pipeline(runtime.bundle, runtime.backend, SafetyPolicy(unprotected=True))
    device = "cuda" if backend == "ort-cuda" else "cpu"
    eager, safety = load_pipeline().to(device), SafetyModule.load(SHIPPED_SAFETY).to(device)

    def draw_eager() -> None:
        generators = [torch.Generator().manual_seed(seed) for seed in range(batch)]
        eager(prompts, generator=generators, num_inference_steps=steps, guidance_scale=5.0)

    def draw_eager_protected() -> None:
        with protect(eager, safety):
            draw_eager()

    contestants: dict[str, Callable[[], object]] = {
        "eager diffusers, protected": draw_eager_protected,
        "eager diffusers, unprotected": draw_eager,
        "runtime, protected": lambda: runtime(prompts, num_inference_steps=steps),
        "runtime, unprotected": lambda: plain(prompts, num_inference_steps=steps),
    }
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for draw in contestants.values():
        draw()  # loads and warms
    for _ in range(repeats):
        for name, draw in contestants.items():
            start = time.perf_counter()
            draw()
            times[name].append((time.perf_counter() - start) / batch)
    medians = {name: statistics.median(values) for name, values in times.items()}
    reference = medians["eager diffusers, protected"]
    return [
        {"batch": batch, "what": name, "seconds_per_image": value, "ratio": reference / value, "all": times[name]}
        for name, value in medians.items()
    ]


def safety_share(batch: int, steps: int, backend: str) -> dict[str, float]:
    """(protected - unprotected) / protected of the runtime: the median over pairs of drawings that follow each other at once,
    so that whatever else a machine does touches both; with the 95 % interval of the median. Whole drawings are timed, of which
    text encoder and decoder are a small part."""
    prompts, pairs = PROMPTS[:batch], PAIRS[batch]
    runtime = Pipeline.from_bundle(backend=backend)
    plain = Pipeline(runtime.bundle, runtime.backend, SafetyPolicy(unprotected=True))

    def seconds(pipeline: Pipeline) -> float:
        start = time.perf_counter()
        pipeline(prompts, num_inference_steps=steps)
        return time.perf_counter() - start

    shares = []
    for pair in range(pairs + 1):
        first, second = (runtime, plain) if pair % 2 else (plain, runtime)
        taken = {first: seconds(first), second: seconds(second)}
        shares.append(1 - taken[plain] / taken[runtime])
    found = bootstrap((np.array(shares[1:]),), np.median, confidence_level=0.95, rng=np.random.default_rng(0))
    low, high = found.confidence_interval
    return {"share": float(np.median(shares[1:])), "low": float(low), "high": float(high), "pairs": pairs}


if __name__ == "__main__":
    main()
