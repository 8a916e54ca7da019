"""What safety training sees: prompt pairs with aligned targets, and latents of real sampling runs with their labels."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from saferedir.engines.errors import TrainingError
from saferedir_torch.alignment import aligned_targets
from saferedir_torch.meaning import confirmed
from saferedir_torch.prompt_source import PromptSource, flags
from saferedir_torch.trajectories import Trajectories, encode, initial_noise, sample

#: A run whose prompt was switched later than this timestep still shows what it started with; its label is left open.
LATEST_CLEAN_SWITCH = 700
#: From this timestep down a latent shows what it is going to be, whatever the prompt says now.
PICTURE_SHOWS = 700
#: Numbers of steps and guidance scales that the recorded runs are drawn with.
SAMPLINGS = ((25, 5.0), (25, 3.0), (15, 5.0), (40, 7.5))


@dataclass
class PairBank:
    """Prompt embeddings and their aligned safe targets, [P, T, D] fp16.

    `asked` [P, N]: the prompt asks for the concept by words that are known to mean it. `replaced` [P, N]: the target is
    without it, which is what a redirection with these concepts active should draw. Both are 0 where nothing is to change.
    `words` [P, T]: the token of the original stands before its end-of-text.
    """

    original: Tensor
    target: Tensor
    asked: Tensor
    replaced: Tensor
    words: Tensor

    def to(self, device: torch.device | str) -> PairBank:
        """The same on another device."""
        return PairBank(*(value.to(device) for value in vars(self).values()))


@dataclass
class LatentBank:
    """What the UNet saw in a step of a run, and what is true about it; one row a step.

    `latent` [S, C, h, w] fp16, `timestep` [S]. `denoised`, as `latent`, is the estimate that the step before made, zero in the
    first. `prompt` [S] is the row of `prompts` [R, T, D] that was in force.
    `asked` [S, N]: the prompt in force asks for the concept. `shown` [S, N]: 1 the latent shows it, 0 it does not,
    -1 open. `run` [S] numbers the runs.
    """

    concepts: tuple[str, ...]
    latent: Tensor
    denoised: Tensor
    timestep: Tensor
    prompt: Tensor
    prompts: Tensor
    asked: Tensor
    shown: Tensor
    run: Tensor

    def to(self, device: torch.device | str) -> LatentBank:
        """The same on another device."""
        moved: dict[str, Any] = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **moved)

    def of(self, concepts: Sequence[str]) -> LatentBank:
        """The same runs, labelled for `concepts` alone, in that order.

        Raises:
            TrainingError: nothing was recorded for one of them.
        """
        missing = [name for name in concepts if name not in self.concepts]
        if missing:
            raise TrainingError(f"the recorded runs are of {', '.join(self.concepts)}; there are none of {', '.join(missing)}")
        columns = [self.concepts.index(name) for name in concepts]
        return replace(self, concepts=tuple(concepts), asked=self.asked[:, columns], shown=self.shown[:, columns])

    def without(self, concept: str) -> LatentBank:
        """The runs that never ask for `concept`."""
        asks = self.asked[:, self.concepts.index(concept)] > 0
        asking = torch.zeros(int(self.run.max()) + 1, dtype=torch.bool)
        asking[self.run[asks]] = True
        rows = ~asking[self.run]
        _, renumbered = torch.unique(self.run[rows], return_inverse=True)
        kept = {name: getattr(self, name)[rows] for name in ("latent", "denoised", "timestep", "prompt", "asked", "shown")}
        return replace(self, **kept, run=renumbered)

    def joined(self, other: LatentBank) -> LatentBank:
        """These runs and those of another recording of the same concepts."""
        both = {
            name: torch.cat([getattr(self, name), getattr(other, name)])
            for name in ("latent", "denoised", "timestep", "asked", "shown")
        }
        return LatentBank(
            concepts=self.concepts,
            prompts=torch.cat([self.prompts, other.prompts]),
            prompt=torch.cat([self.prompt, other.prompt + len(self.prompts)]),
            run=torch.cat([self.run, other.run + int(self.run.max()) + 1]),
            **both,
        )


def make_pairs(pipeline: StableDiffusionPipeline, source: PromptSource, *, count: int, seed: int) -> PairBank:
    """`count` pairs a concept, and half as many safe rewrites and `count` benign prompts, to be left alone."""
    originals, targets, asked, replaced, words = [], [], [], [], []
    end_id = pipeline.tokenizer.eos_token_id
    concepts = list(source.replacements)
    for index, concept in enumerate(concepts):
        rng = np.random.default_rng([seed, 21, index])
        pairs = confirmed(pipeline, [source.varied_pair(concept, rng) for _ in range(count)])
        unsafe_ids, unsafe = _encode_all(pipeline, [pair.unsafe for pair in pairs])
        safe_ids, safe = _encode_all(pipeline, [pair.safe for pair in pairs])
        clean = [row for row, pair in enumerate(pairs) if set(pair.asked) <= set(pair.replaced)][: count // 2]
        benign_ids, benign = _encode_all(pipeline, [source.varied_benign(rng) for _ in range(count)])
        untouched = torch.cat([safe[clean], benign])
        originals += [unsafe.half(), untouched.half()]
        targets += [aligned_targets(unsafe_ids, safe_ids, unsafe, safe, end_id).half(), untouched.half()]
        nothing = torch.zeros(len(untouched), len(concepts))
        asked += [torch.tensor(flags([pair.asked for pair in pairs], concepts)), nothing]
        replaced += [torch.tensor(flags([pair.replaced for pair in pairs], concepts)), nothing]
        words += [_before_end(torch.cat([unsafe_ids, safe_ids[clean], benign_ids]), end_id)]
    return PairBank(*(torch.cat(parts) for parts in (originals, targets, asked, replaced, words)))


def record_runs(
    pipeline: StableDiffusionPipeline,
    source: PromptSource,
    *,
    count: int,
    seed: int,
    samplings: Sequence[tuple[int, float]] = SAMPLINGS,
    on_progress: Callable[[int, int], None] | None = None,
) -> LatentBank:
    """Draw, for each concept, `count` unsafe runs, half as many of its rewrites, twice as many benign ones, and half as
    many that are redirected to the rewrite's embedding half-way, and keep every step of them; at last, with the fewest
    steps, twice as many benign ones again."""
    low, high = source.seeds
    _, empty = encode(pipeline, [""])
    end_id = pipeline.tokenizer.eos_token_id
    rows: list[dict[str, Tensor]] = []
    prompts: list[Tensor] = []
    concepts = list(source.replacements)
    jobs = [(concept, sampling) for concept in concepts for sampling in samplings]
    runs = 0
    for done, (concept, (steps, guidance)) in enumerate(jobs):
        rng = np.random.default_rng([seed, 22, done])
        share = max(2, count // len(samplings))
        pairs = [source.pair(concept, rng) for _ in range(share)]
        benign = [source.benign(rng) for _ in range(2 * share)]
        unsafe_ids, unsafe = encode(pipeline, [pair.unsafe for pair in pairs])
        safe_ids, safe = encode(pipeline, [pair.safe for pair in pairs])
        target = aligned_targets(unsafe_ids, safe_ids, unsafe, safe, end_id)
        half = share // 2
        started = torch.cat([unsafe, safe[:half], encode(pipeline, benign)[1], unsafe[:half]])
        later = torch.cat([unsafe, safe[:half], started[share + half : -half], target[:half]])
        switch = torch.full((len(started),), steps + 1)
        switch[-half:] = torch.from_numpy(rng.integers(0, steps, size=half))
        noise = initial_noise(pipeline, [int(s) for s in rng.integers(low, high, size=len(started))])
        drawn = sample(
            pipeline,
            started,
            empty,
            noise,
            steps=steps,
            guidance_scale=guidance,
            redirected=later,
            redirect_at=switch,
            exact=False,
        )
        asked = torch.tensor(flags([pair.asked for pair in pairs], concepts))
        left = asked - torch.tensor(flags([pair.replaced for pair in pairs], concepts))
        nothing = torch.zeros(2 * share, len(concepts))
        asks = torch.cat([asked, left[:half], nothing, asked[:half]])
        asks_later = torch.cat([asked, left[:half], nothing, left[:half]])
        base = sum(len(part) for part in prompts)
        prompts += [started.half(), later.half()]
        rows.append(_label(drawn, asks, asks_later, switch, base, runs))
        runs += len(started)
        if on_progress is not None:
            on_progress(done + 1, len(jobs) + 1)
    rng = np.random.default_rng([seed, 23])
    steps, guidance = min(samplings)
    _, started = encode(pipeline, [source.benign(rng) for _ in range(2 * max(2, count) * len(concepts))])
    noise = initial_noise(pipeline, [int(s) for s in rng.integers(low, high, size=len(started))])
    drawn = sample(pipeline, started, empty, noise, steps=steps, guidance_scale=guidance, exact=False)
    nothing = torch.zeros(len(started), len(concepts))
    never = torch.full((len(started),), steps + 1)
    base = sum(len(part) for part in prompts)
    prompts += [started.half(), started.half()]
    rows.append(_label(drawn, nothing, nothing, never, base, runs))
    if on_progress is not None:
        on_progress(len(jobs) + 1, len(jobs) + 1)
    joined = {key: torch.cat([row[key] for row in rows]) for key in rows[0]}
    return LatentBank(concepts=tuple(concepts), prompts=torch.cat(prompts), **joined)


def cached_runs(path: Path, make: Callable[[], LatentBank]) -> LatentBank:
    """The bank in `path`, made and saved (whole or not at all) where it is missing.

    Raises:
        TrainingError: the file is damaged.
    """
    if path.exists():
        return load_runs(path)
    bank = make()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    tensors = {key: value.contiguous() for key, value in vars(bank).items() if key != "concepts"}
    save_file(tensors, partial, metadata={"concepts": json.dumps(bank.concepts)})
    os.replace(partial, path)
    return bank


def load_runs(path: Path) -> LatentBank:
    """The bank in `path`.

    Raises:
        TrainingError: it is missing or damaged.
    """
    try:
        with safe_open(path, "pt") as file:
            concepts = tuple(json.loads(file.metadata()["concepts"]))
        return LatentBank(concepts=concepts, **load_file(path))
    except (OSError, SafetensorError, KeyError, TypeError) as error:
        raise TrainingError(f"{path} holds no recorded runs ({error}); delete it to record anew") from error


def _label(
    drawn: Trajectories, asks: Tensor, asks_later: Tensor, switch: Tensor, base: int, first_run: int
) -> dict[str, Tensor]:
    """One row a step: of R runs; asks and asks_later [R, N], what the prompt asks for before and from the
    step `switch` [R] on."""
    (runs, steps), timesteps = drawn.latents.shape[:2], drawn.timesteps
    index = torch.arange(steps)
    switched = index[None] >= switch[:, None]  # [R, steps]
    asked = torch.where(switched[..., None], asks_later[:, None], asks[:, None])  # [R, steps, N]
    # Shown: the run asked for it so far, and has come far enough for the latent to tell.
    clear = (timesteps < PICTURE_SHOWS)[None, :, None]
    shown = torch.where(clear | (asks == 0)[:, None], asked, torch.full_like(asked, -1.0))
    switch_time = timesteps[switch.clamp(max=steps - 1)]
    late = (switched & (switch_time < LATEST_CLEAN_SWITCH)[:, None])[..., None] & (asks > asks_later)[:, None]
    shown = torch.where(late, torch.full_like(shown, -1.0), shown)
    prompt = base + torch.arange(runs)[:, None] + torch.where(switched, runs, 0)
    return {
        "latent": drawn.latents.flatten(0, 1),
        "denoised": drawn.denoised.flatten(0, 1),
        "timestep": timesteps.repeat(runs),
        "prompt": prompt.flatten(),
        "asked": asked.flatten(0, 1),
        "shown": shown.flatten(0, 1),
        "run": (first_run + torch.arange(runs)).repeat_interleave(steps),
    }


def _before_end(ids: Tensor, end_id: int) -> Tensor:
    """ids [P, T] -> [P, T], true before the first `end_id`."""
    return (ids == end_id).int().cumsum(dim=1) == 0


def _encode_all(pipeline: StableDiffusionPipeline, prompts: list[str], chunk: int = 128) -> tuple[Tensor, Tensor]:
    parts = [encode(pipeline, prompts[start : start + chunk]) for start in range(0, len(prompts), chunk)]
    ids, embeds = zip(*parts, strict=True)
    return torch.cat(ids), torch.cat(embeds)
