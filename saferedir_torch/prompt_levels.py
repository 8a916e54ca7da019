"""What benign prompts come up to by single words, in steps whose latent is noise still.

The levels of a branch are what benign pictures come up to around each knot, and around the first those are latents that begin
to show something. In the first step there is nothing but noise, and a detector that reads it along with the prompt takes some
noise for a concept where the prompt says little. Single words do not read it, and tell prompts apart far better than those
levels ask for. So in that step they have levels of their own, for which nothing is drawn.

These are read off benign prompts in strange words. Plain ones stay so far below that they would leave no room for what strange
words say now and then without meaning it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from msgspec.structs import replace
from torch import Tensor

from saferedir.engines.manifest import Promise
from saferedir_torch.attacks.hardening import in_strange_words
from saferedir_torch.calibration import rate_beside
from saferedir_torch.safety_module import SafetyModule
from saferedir_torch.trajectories import encode, initial_noise

#: Share of benign prompts in strange words that stay below the level. What fires lies above it by as much as thresholds do.
STRANGE_SHARE = 0.95
#: Prompts in strange words that are looked at.
STRANGE = 10_000
CHUNK = 256


@torch.no_grad()
def set_prompt_levels(pipeline: StableDiffusionPipeline, module: SafetyModule, prompts: Sequence[str], *, seed: int) -> None:
    """Set the `prompt_levels` of the branch trained last by benign `prompts` that are written in strange words."""
    rng = np.random.default_rng([seed, 41])
    strange = in_strange_words([prompts[int(row)] for row in rng.integers(len(prompts), size=STRANGE)], rng)
    branch, said = module.last_branch, []
    for start in range(0, STRANGE, CHUNK):
        _, embeds = encode(pipeline, strange[start : start + CHUNK])
        said.append(branch.detector.words(embeds.to(branch.gains)).cpu())
    level = torch.quantile(torch.cat(said).double(), STRANGE_SHARE, dim=0)
    branch.prompt_levels.copy_(level.half())  # rounded as it will be on disk


@torch.no_grad()
def fires_first(
    pipeline: StableDiffusionPipeline, module: SafetyModule, prompts: Sequence[str], seeds: Sequence[int], timestep: float
) -> Tensor:
    """[R, N] bool: a first step at `timestep` fires for each concept, for each prompt and the noise of its seed."""
    thresholds = torch.tensor([concept.threshold for concept in module.config.concepts])
    gains, fired = module.last_branch.gains, []
    for start in range(0, len(prompts), CHUNK):
        part = slice(start, start + CHUNK)
        embeds, noise = encode(pipeline, list(prompts[part]))[1].to(gains), initial_noise(pipeline, list(seeds[part])).to(gains)
        score = module.score(noise, torch.full((len(noise),), timestep).to(gains), embeds).score
        fired.append(score.cpu() >= thresholds)
    return torch.cat(fired)


def restated(promise: Promise, more: int, *, levels: int = 0) -> Promise:
    """What a promise comes to where `more` of its benign pictures fire than it allowed, and none by `levels` that were set on
    them."""
    if more <= 0:
        return promise
    allowed = promise.allowed + more
    return replace(promise, allowed=allowed, rate=round(rate_beside(allowed, levels, promise.pictures, promise.confidence), 6))


def first_timestep(pipeline: StableDiffusionPipeline, steps: int) -> float:
    """Of so many steps by the pipeline's own scheduler."""
    scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config)
    scheduler.set_timesteps(steps)
    return float(scheduler.timesteps[0])
