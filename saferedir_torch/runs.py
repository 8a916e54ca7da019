"""Recorded runs that safety training looks at: steps of real sampling, drawn across the envelope, and what is true of them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from saferedir.engines.errors import TrainingError
from saferedir.engines.manifest import Envelope
from saferedir_torch.alignment import aligned_targets
from saferedir_torch.envelope import TAUGHT, Sampling, samplings
from saferedir_torch.prompt_source import PromptSource, flags
from saferedir_torch.safety_module import parameters_sha256
from saferedir_torch.trajectories import Trajectories, encode, initial_noise, sample

#: From this noise share down a latent shows what it is going to be, whatever the prompt says now. A run whose prompt was
#: switched later than that still shows what it started with; its label is left open.
PICTURE_SHOWS = 0.769
#: Runs that are drawn side by side with one sampler, number of steps and guidance scale: of a concept in turn so many that ask
#: for it, their rewrites, benign ones, and unsafe ones that are redirected half-way.
UNSAFE, REWRITES, BENIGN, SWITCHED = 20, 6, 14, 8
RUNS = UNSAFE + REWRITES + BENIGN + SWITCHED
#: Share of such groups that have a negative prompt, a benign one.
NEGATIVE_SHARE = 0.3
#: Groups in one file, so that a recording which was stopped goes on with the next.
PART = 12


@dataclass
class RunBank:
    """What the denoiser saw in a step of a run, what was known by then, and what is true of it; one row a step.

    `latent` and `denoised` [S, C, h, w] fp16, `share` [S] the noise share, `first` [S] bool where there is no estimate yet.
    `prompt` and `negative` [S] are rows of `prompts` [R, T, D]. `asked` [S, N]: the prompt in force asks for the concept.
    `shown` [S, N]: 1 the latent shows it, 0 it does not, -1 open. `run` [S] numbers the runs, `guidance` [S].
    """

    concepts: tuple[str, ...]
    latent: Tensor
    denoised: Tensor
    share: Tensor
    first: Tensor
    prompt: Tensor
    negative: Tensor
    prompts: Tensor
    asked: Tensor
    shown: Tensor
    run: Tensor
    guidance: Tensor

    def to(self, device: torch.device | str) -> RunBank:
        """The same on another device."""
        moved: dict[str, Any] = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **moved)

    def of(self, concepts: Sequence[str]) -> RunBank:
        """The same runs, labelled for `concepts` alone, in that order.

        Raises:
            TrainingError: nothing was recorded for one of them.
        """
        missing = [name for name in concepts if name not in self.concepts]
        if missing:
            raise TrainingError(f"the recorded runs are of {', '.join(self.concepts)}; there are none of {', '.join(missing)}")
        columns = [self.concepts.index(name) for name in concepts]
        return replace(self, concepts=tuple(concepts), asked=self.asked[:, columns], shown=self.shown[:, columns])

    def highest(self, of_steps: Tensor) -> Tensor:
        """The highest of each run, of values [S, N]: [R, N]."""
        start = torch.full((int(self.run.max()) + 1, of_steps.shape[1]), -torch.inf, dtype=of_steps.dtype)
        return start.scatter_reduce(0, self.run[:, None].expand_as(of_steps), of_steps, "amax")

    def without(self, concept: str) -> RunBank:
        """The runs that never ask for `concept`."""
        asks = self.asked[:, self.concepts.index(concept)] > 0
        asking = torch.zeros(int(self.run.max()) + 1, dtype=torch.bool)
        asking[self.run[asks]] = True
        return self.rows(~asking[self.run])

    def rows(self, chosen: Tensor) -> RunBank:
        """Some of the steps, whole runs of them, `chosen` [S] bool."""
        _, renumbered = torch.unique(self.run[chosen], return_inverse=True)
        kept = {
            name: value[chosen] for name, value in vars(self).items() if name not in ("concepts", "prompts", "run")
        }  # fmt: skip
        return replace(self, **kept, run=renumbered)


def joined(banks: Sequence[RunBank]) -> RunBank:
    """The runs of several recordings of the same concepts."""
    parts: dict[str, list[Tensor]] = {}
    prompts = runs = 0
    for bank in banks:
        shift = {"prompt": prompts, "negative": prompts, "run": runs}
        for name, value in vars(bank).items():
            if isinstance(value, Tensor):
                parts.setdefault(name, []).append(value + shift[name] if name in shift else value)
        prompts, runs = prompts + len(bank.prompts), runs + int(bank.run.max()) + 1
    return RunBank(concepts=banks[0].concepts, **{name: torch.cat(values) for name, values in parts.items()})


def recorded_runs(
    pipeline: StableDiffusionPipeline,
    source: PromptSource,
    folder: Path,
    *,
    count: int,
    seed: int,
    envelope: Envelope,
    on_progress: Callable[[int, int], None] | None = None,
) -> RunBank:
    """About `count` runs of all kinds across `envelope`, recorded in parts that are kept in `folder`, whole or not at all.

    Raises:
        TrainingError: a file of the folder is damaged, or was recorded of another model, concepts, seed or envelope.
    """
    groups = samplings(max(1, round(count / RUNS)), envelope, np.random.default_rng([seed, 22]), TAUGHT)

    concepts = list(source.replacements)

    def group(index: int) -> RunBank:
        # Of every concept with every sampler in turn.
        concept = concepts[index // len(envelope.samplers) % len(concepts)]
        return _group(pipeline, source, concept, groups[index], np.random.default_rng([seed, 23, index]))

    made_of = [parameters_sha256(pipeline.unet), concepts, seed, str(envelope)]
    return _in_parts(folder, groups, group, on_progress, made_of)


def benign_runs(
    pipeline: StableDiffusionPipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    folder: Path,
    *,
    seed: int,
    envelope: Envelope,
    on_progress: Callable[[int, int], None] | None = None,
) -> RunBank:
    """Runs of benign `prompts`, one a seed, across `envelope`, kept in `folder` as well. Nothing is asked for or shown in them.

    Raises:
        TrainingError: a file of the folder is damaged, or was recorded with other prompts or seeds.
    """
    groups = samplings(-(-len(prompts) // RUNS), envelope, np.random.default_rng([seed, 24]))

    def group(index: int) -> RunBank:
        rows, rng = slice(index * RUNS, (index + 1) * RUNS), np.random.default_rng([seed, 25, index])
        _, embeds = encode(pipeline, list(prompts[rows]))
        other = prompts[int(rng.integers(len(prompts)))] if rng.random() < NEGATIVE_SHARE else ""
        drawing = _Drawing(embeds, embeds, torch.full((len(embeds),), groups[index].steps + 1), encode(pipeline, [other])[1])
        nothing = torch.zeros(len(embeds), 0)
        return _drawn(pipeline, groups[index], drawing, list(seeds[rows]), (), nothing, nothing)

    made_of = [parameters_sha256(pipeline.unet), list(prompts), list(seeds), seed, str(envelope)]
    return _in_parts(folder, groups, group, on_progress, made_of)


def _in_parts(
    folder: Path,
    groups: Sequence[Sampling],
    group: Callable[[int], RunBank],
    on_progress: Callable[[int, int], None] | None,
    made_of: Sequence[Any],
) -> RunBank:
    """The groups of runs, in files of `PART` groups, which state what they are made of."""
    parts = []
    for number, start in enumerate(range(0, len(groups), PART)):
        own = range(start, min(start + PART, len(groups)))
        of = hashlib.sha256(json.dumps([made_of, [groups[index] for index in own]]).encode()).hexdigest()
        path = folder / f"runs_{number:03d}.safetensors"
        if not path.exists():
            _save(joined([group(index) for index in own]), path, of)
        parts.append(load_runs(path, of))
        if on_progress is not None:
            on_progress(own.stop * RUNS, len(groups) * RUNS)
    return joined(parts)


def runs_in(folder: Path) -> RunBank:
    """All runs that another training recorded in `folder`.

    Raises:
        TrainingError: there are none, or a file is damaged.
    """
    paths = sorted(folder.glob("runs_*.safetensors"))
    if not paths:
        raise TrainingError(f"{folder} holds no recorded runs, files called runs_000.safetensors and so on")
    return joined([load_runs(path) for path in paths])


def load_runs(path: Path, of: str = "") -> RunBank:
    """The bank in `path`.

    Raises:
        TrainingError: it is missing or damaged, or made of something else than `of`.
    """
    try:
        with safe_open(path, "pt") as file:
            stated = file.metadata()
            concepts = tuple(json.loads(stated["concepts"]))
        if of and stated["of"] != of:
            raise TrainingError(f"{path} was recorded of another model, prompts, seeds or settings; give another folder")
        return RunBank(concepts=concepts, **load_file(path))
    except (OSError, SafetensorError, KeyError, TypeError) as error:
        raise TrainingError(f"{path} holds no recorded runs ({error}); delete it to record anew") from error


def _save(bank: RunBank, path: Path, of: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    tensors = {key: value.contiguous() for key, value in vars(bank).items() if key != "concepts"}
    save_file(tensors, partial, metadata={"concepts": json.dumps(bank.concepts), "of": of})
    os.replace(partial, path)


def _group(
    pipeline: StableDiffusionPipeline, source: PromptSource, concept: str, sampling: Sampling, rng: np.random.Generator
) -> RunBank:
    """Runs of one sampling, half of which ask for `concept`."""
    concepts = list(source.replacements)
    pairs = [source.pair(concept, rng) for _ in range(UNSAFE + SWITCHED)]
    unsafe_ids, unsafe = encode(pipeline, [pair.unsafe for pair in pairs])
    safe_ids, safe = encode(pipeline, [pair.safe for pair in pairs])
    _, benign = encode(pipeline, [source.benign(rng) for _ in range(BENIGN)])
    _, negative = encode(pipeline, [source.benign(rng) if rng.random() < NEGATIVE_SHARE else ""])
    later = slice(UNSAFE, None)
    target = aligned_targets(unsafe_ids[later], safe_ids[later], unsafe[later], safe[later], pipeline.tokenizer.eos_token_id)
    started = torch.cat([unsafe[:UNSAFE], safe[:REWRITES], benign, unsafe[later]])
    switch = torch.full((RUNS,), sampling.steps + 1)
    switch[-SWITCHED:] = torch.from_numpy(rng.integers(0, sampling.steps, size=SWITCHED))
    drawing = _Drawing(started, torch.cat([started[: RUNS - SWITCHED], target]), switch, negative)
    asked = torch.tensor(flags([pair.asked for pair in pairs], concepts))
    left = asked - torch.tensor(flags([pair.replaced for pair in pairs], concepts))
    before = torch.cat([asked[:UNSAFE], left[:REWRITES], torch.zeros(BENIGN, len(concepts)), asked[later]])
    after = torch.cat([before[: RUNS - SWITCHED], left[later]])
    seeds = [int(number) for number in rng.integers(*source.seeds, size=RUNS)]
    return _drawn(pipeline, sampling, drawing, seeds, tuple(concepts), before, after)


class _Drawing(NamedTuple):
    """R runs: embeddings before and from the step `switch` [R] on, [R, T, D], and the negative prompt's [1, T, D]."""

    before: Tensor
    after: Tensor
    switch: Tensor
    negative: Tensor


def _drawn(
    pipeline: StableDiffusionPipeline, sampling: Sampling, drawing: _Drawing, seeds: list[int], concepts: tuple[str, ...],
    asked: Tensor, asked_after: Tensor,
) -> RunBank:  # fmt: skip
    """Draw runs whose prompts ask for `asked` [R, N], and after the switch for `asked_after`."""
    runs = len(seeds)
    drawn = sample(
        pipeline, drawing.before, drawing.negative, initial_noise(pipeline, seeds), steps=sampling.steps,
        guidance_scale=sampling.guidance_scale, redirected=drawing.after, redirect_at=drawing.switch, exact=False,
        sampler=sampling.sampler, seeds=seeds,
    )  # fmt: skip
    labels, steps = _labels(drawn, asked, asked_after, drawing.switch), len(drawn.shares)
    switches = drawing.switch < steps
    later = runs + switches.cumsum(0) - 1
    return RunBank(
        concepts=concepts,
        latent=drawn.latents.flatten(0, 1),
        denoised=drawn.denoised.flatten(0, 1),
        share=drawn.shares.repeat(runs),
        first=(torch.arange(steps) == 0).repeat(runs),
        prompts=torch.cat([drawing.before, drawing.after[switches], drawing.negative]).half(),
        prompt=torch.where(labels.switched, later[:, None], torch.arange(runs)[:, None]).flatten(),
        negative=torch.full((runs * steps,), runs + int(switches.sum())),
        asked=labels.asked.flatten(0, 1),
        shown=labels.shown.flatten(0, 1),
        run=torch.arange(runs).repeat_interleave(steps),
        guidance=torch.full((runs * steps,), sampling.guidance_scale),
    )


class _Labels(NamedTuple):
    asked: Tensor
    shown: Tensor
    switched: Tensor


def _labels(drawn: Trajectories, before: Tensor, after: Tensor, switch: Tensor) -> _Labels:
    """What each step's prompt asks for and its latent shows [R, steps, N], from what prompts ask for before and from the step
    `switch` [R] on, [R, N] both."""
    steps = len(drawn.shares)
    switched = torch.arange(steps)[None] >= switch[:, None]  # [R, steps]
    asked = torch.where(switched[..., None], after[:, None], before[:, None])
    # Shown: the run asked for it so far, and has come far enough for the latent to tell.
    clear = (drawn.shares < PICTURE_SHOWS)[None, :, None]
    shown = torch.where(clear | (before == 0)[:, None], asked, torch.full_like(asked, -1.0))
    at_switch = drawn.shares[switch.clamp(max=steps - 1)]
    late = (switched & (at_switch < PICTURE_SHOWS)[:, None])[..., None] & (before > after)[:, None]
    return _Labels(asked, torch.where(late, torch.full_like(shown, -1.0), shown), switched)
