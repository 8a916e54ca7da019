"""Is the latent really used? Detector accuracy on test runs, intact and with latents and timesteps shuffled among requests."""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import torch

from benchmarks.report import save
from saferedir_torch.estimate import shown_estimate
from saferedir_torch.evaluation.intervals import share
from saferedir_torch.models import SHIPPED_SAFETY, load_pipeline
from saferedir_torch.safety_module import SafetyModule
from saferedir_torch.trajectories import encode, initial_noise, sample
from saferedir_torch.world.captions import all_names
from saferedir_torch.world.prompts import CONCEPTS, benign_prompt, evaluation_pairs
from saferedir_torch.world.split import load_split

BANDS = ((0, 250), (250, 500), (500, 750), (750, 1000))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=160, help="unsafe runs, and as many benign ones")
    options = parser.parse_args()
    figures = measure(options.count)
    for key, value in figures.items():
        print(key, value)
    print(save("latent_use", figures))


@torch.no_grad()
def measure(count: int) -> dict[str, Any]:
    """Unsafe runs of held-out names, and benign runs; balanced accuracy of the decision at the shipped threshold."""
    pipeline, safety, split = load_pipeline(), SafetyModule.load(SHIPPED_SAFETY), load_split()
    rng = np.random.default_rng(81)
    concept = CONCEPTS["church"]
    prompts = [pair.unsafe for pair in evaluation_pairs(concept, split, "held_out", count, seed=6)]
    prompts += [benign_prompt([concept], rng, all_names()).text for _ in range(count)]
    noise = initial_noise(pipeline, [int(seed) for seed in rng.integers(*split.seeds["test"], size=2 * count)])
    _, embeds = encode(pipeline, prompts)
    _, empty = encode(pipeline, [""])
    runs = sample(pipeline, embeds, empty, noise)
    truth = torch.arange(2 * count) < count
    threshold = safety.config.concepts[0].threshold
    steps = len(runs.timesteps)
    own, order = torch.arange(2 * count), torch.from_numpy(rng.permutation(2 * count))
    swapped_time = torch.from_numpy(rng.integers(steps, size=(2 * count, steps)))

    estimates = shown_estimate(runs.denoised)

    def accuracies(rows: torch.Tensor, times: torch.Tensor, prompt: torch.Tensor) -> dict[str, Any]:
        latents, ahead = runs.latents[rows].float(), estimates[rows]
        decided = torch.stack([
            safety.score(latents[:, s], times[:, s], prompt, ahead[:, s]).score[:, 0] >= threshold for s in range(steps)
        ], dim=1)  # fmt: skip
        right = decided == truth[:, None]
        result: dict[str, Any] = {"all": share(int(right.sum()), right.numel())}
        for low, high in BANDS:
            band = (runs.timesteps >= low) & (runs.timesteps < high)
            result[f"timestep {low}-{high}"] = share(int(right[:, band].sum()), int(right[:, band].numel()))
        return result

    times = runs.timesteps.expand(2 * count, -1)
    blank = empty.expand_as(embeds)
    return {
        "runs": 2 * count,
        "intact": accuracies(own, times, embeds),
        "latents_shuffled": accuracies(order, times, embeds),
        "timesteps_shuffled": accuracies(own, runs.timesteps[swapped_time], embeds),
        "latents_and_timesteps_shuffled": accuracies(order, runs.timesteps[swapped_time], embeds),
        "prompt_blanked": accuracies(own, times, blank),
    }


if __name__ == "__main__":
    main()
