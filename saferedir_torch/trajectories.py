"""Latents from real sampling, on which the detector is trained: unsafe, safe, benign and half-way redirected runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    StableDiffusionPipeline,
)
from torch import Tensor

from saferedir.engines.errors import RequestError
from saferedir_torch.estimate import NoiseLevels
from saferedir_torch.precision import mixed_precision

#: Runs that are drawn side by side, by the kind of device.
CHUNKS = {"cpu": 64, "cuda": 1024}
LARGEST_HALF = torch.finfo(torch.float16).max
_KARRAS = {"use_karras_sigmas": True, "use_exponential_sigmas": False}
_EXPONENTIAL = {"use_karras_sigmas": False, "use_exponential_sigmas": True}
_PLAIN = {"use_karras_sigmas": False, "use_exponential_sigmas": False}
_TWO_M = {"algorithm_type": "dpmsolver++", "solver_order": 2, "solver_type": "midpoint"}
#: What runs can be drawn by, under the names that the runtime has for them: the class of diffusers, and what it is told beside
#: the model's noise schedule.
SAMPLERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "ddim": (DDIMScheduler, {}),
    "euler": (EulerDiscreteScheduler, _PLAIN),
    "euler-karras": (EulerDiscreteScheduler, _KARRAS),
    "euler-exponential": (EulerDiscreteScheduler, _EXPONENTIAL),
    "euler-ancestral": (EulerAncestralDiscreteScheduler, {}),
    "dpm++-2m": (DPMSolverMultistepScheduler, _TWO_M | _PLAIN),
    "dpm++-2m-karras": (DPMSolverMultistepScheduler, _TWO_M | _KARRAS),
    "dpm++-2m-exponential": (DPMSolverMultistepScheduler, _TWO_M | _EXPONENTIAL),
    "lcm": (LCMScheduler, {}),
}
#: Those that add noise in a step.
STOCHASTIC = frozenset({"euler-ancestral", "lcm"})


@dataclass
class Trajectories:
    """Recorded runs of one sampler and number of steps: what the denoiser saw before each step, and what was known by then."""

    #: After the sampler's input scaling, [R, steps, C, h, w] fp16.
    latents: Tensor
    #: The estimate of the finished picture that the step before made, zero in the first: [R, steps, C, h, w] fp16.
    denoised: Tensor
    #: [steps] float, the same for every run.
    timesteps: Tensor
    #: Noise share of each step's level, [steps].
    shares: Tensor
    #: Final latents, [R, C, h, w].
    final: Tensor


def tokenize(tokenizer: Any, prompts: list[str]) -> Tensor:
    """Token ids [B, T], padded and cut as Stable Diffusion does."""
    ids: Tensor = tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids
    return ids


@torch.no_grad()
def encode(pipeline: StableDiffusionPipeline, prompts: list[str]) -> tuple[Tensor, Tensor]:
    """Token ids [B, T] and embeddings [B, T, D] of `prompts`, on the CPU wherever the pipeline is."""
    ids = tokenize(pipeline.tokenizer, prompts)
    return ids, pipeline.text_encoder(ids.to(pipeline.device)).last_hidden_state.cpu()


def initial_noise(pipeline: StableDiffusionPipeline, seeds: list[int]) -> Tensor:
    """One latent of standard noise a seed, as diffusers draws it on the CPU: [B, C, h, w]."""
    shape = _latent_shape(pipeline)
    return torch.cat([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def _latent_shape(pipeline: StableDiffusionPipeline) -> tuple[int, int, int, int]:
    config = pipeline.unet.config
    return 1, config.in_channels, config.sample_size, config.sample_size


def generators_of(pipeline: StableDiffusionPipeline, seeds: Sequence[int]) -> list[torch.Generator]:
    """What draws the noise that samplers add in a step, one a seed: where `initial_noise` left it, as in diffusers."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    for generator in generators:
        torch.randn(_latent_shape(pipeline), generator=generator)
    return generators


def make_scheduler(pipeline: StableDiffusionPipeline, sampler: str) -> Any:
    """The scheduler of diffusers that is called `sampler` here, of the noise schedule of `pipeline`.

    Raises:
        RequestError: there is none, or the model is not made for it.
    """
    if sampler not in SAMPLERS:
        raise RequestError(f"sampler is {sampler!r}; expected one of {', '.join(SAMPLERS)}")
    if sampler == "lcm" and not isinstance(pipeline.scheduler, LCMScheduler):
        name = type(pipeline.scheduler).__name__
        raise RequestError(f"sampler is 'lcm', which draws with consistency models alone; the model's scheduler is {name}")
    kind, options = SAMPLERS[sampler]
    return kind.from_config(pipeline.scheduler.config, **options)


@torch.no_grad()
def sample(
    pipeline: StableDiffusionPipeline,
    embeds: Tensor,
    negative: Tensor,
    noise: Tensor,
    *,
    steps: int = 25,
    guidance_scale: float = 5.0,
    redirected: Tensor | None = None,
    redirect_at: Tensor | None = None,
    exact: bool = True,
    sampler: str = "ddim",
    seeds: Sequence[int] | None = None,
) -> Trajectories:
    """Draw with `embeds` [R, T, D] from `noise` [R, C, h, w]; from step `redirect_at` [R] on with `redirected` [R, T, D].

    `negative` [1, T, D] is the unconditional embedding. Without `exact` the UNet computes in half precision (bf16 on the
    CPU, where noise predictions then differ by half a percent), in half the time: enough for what detectors learn from.
    `sampler` is one of `SAMPLERS`; those in `STOCHASTIC` draw the noise of a run by its number in `seeds`.
    What is given and what comes back is on the CPU, wherever the pipeline is.

    Raises:
        RequestError: the sampler is unknown, the model is not made for it, or it needs seeds.
        SafetyMismatchError: the pipeline's scheduler does not tell how noisy a latent is.
    """
    scheduler = make_scheduler(pipeline, sampler)
    if sampler in STOCHASTIC and (seeds is None or len(seeds) != len(embeds)):
        raise RequestError(f"sampler is {sampler!r}, which adds noise in a step; expected {len(embeds)} seeds to draw it by")
    generators = generators_of(pipeline, seeds) if sampler in STOCHASTIC and seeds is not None else None
    chunk = CHUNKS.get(pipeline.device.type, CHUNKS["cpu"])
    embeds, negative, noise = (tensor.to(pipeline.device) for tensor in (embeds, negative, noise))
    if redirected is not None and redirect_at is not None:
        redirected, redirect_at = redirected.to(pipeline.device), redirect_at.to(pipeline.device)

    def guided(rows: slice, index: int, seen: Tensor, timestep: Tensor) -> Tensor:
        prompt = embeds[rows]
        if redirected is not None and redirect_at is not None:
            prompt = torch.where((redirect_at[rows] <= index)[:, None, None], redirected[rows], prompt)
        both = torch.cat([negative.expand_as(prompt), prompt])
        with nullcontext() if exact else mixed_precision(seen.device):
            predicted = pipeline.unet(torch.cat([seen] * 2), timestep, both, return_dict=False)[0].float()
        without, conditional = predicted.chunk(2)
        combined: Tensor = without + guidance_scale * (conditional - without)
        return combined

    parts = []
    for start in range(0, len(embeds), chunk):
        rows = slice(start, start + chunk)
        scheduler.set_timesteps(steps)
        own = None if generators is None else generators[rows]
        parts.append(_sample_chunk(scheduler, noise[rows], partial(guided, rows), own))
    seen, estimates, finals = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    levels, timesteps = NoiseLevels(scheduler), scheduler.timesteps.float().cpu()
    shares = torch.tensor([levels.at(float(timestep)).share for timestep in timesteps])
    return Trajectories(seen, estimates, timesteps, shares, finals)


def _sample_chunk(
    scheduler: Any,
    noise: Tensor,
    guided: Callable[[int, Tensor, Tensor], Tensor],
    generators: list[torch.Generator] | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """What the denoiser saw and the estimates of the steps before, [R, steps, C, h, w] fp16, and the final latents."""
    levels, options = NoiseLevels(scheduler), {} if generators is None else {"generator": generators}
    latent = noise * scheduler.init_noise_sigma
    all_seen, estimates = [], [torch.zeros_like(latent)]
    for index, timestep in enumerate(scheduler.timesteps):
        seen = scheduler.scale_model_input(latent, timestep)
        predicted = guided(index, seen, timestep)
        all_seen.append(seen.half())
        estimates.append(levels.denoised(seen, float(timestep), predicted).clamp(-LARGEST_HALF, LARGEST_HALF))
        latent = scheduler.step(predicted, timestep, latent, **options).prev_sample
    return torch.stack(all_seen, dim=1).cpu(), torch.stack(estimates[:-1], dim=1).half().cpu(), latent.cpu()


@torch.no_grad()
def decode(pipeline: StableDiffusionPipeline, latents: Tensor) -> Tensor:
    """Final latents [B, C, h, w] -> pictures [B, 3, H, W] in [-1, 1], on the CPU."""
    chunks = (latents.to(pipeline.device) / pipeline.vae.config.scaling_factor).split(64)
    pictures: Tensor = torch.cat([pipeline.vae.decode(chunk, return_dict=False)[0] for chunk in chunks])
    return pictures.clamp(-1, 1).cpu()
