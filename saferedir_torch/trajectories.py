"""Latents from real sampling, on which the detector is trained: unsafe, safe, benign and half-way redirected runs."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from torch import Tensor

from saferedir_torch.precision import mixed_precision

#: Runs that are drawn side by side, by the kind of device.
CHUNKS = {"cpu": 64, "cuda": 1024}


@dataclass
class Trajectories:
    """Recorded runs of one number of steps: what the UNet saw before each step."""

    #: [R, steps, C, h, w] fp16.
    latents: Tensor
    #: [steps] float, the same for every run.
    timesteps: Tensor
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
    config = pipeline.unet.config
    shape = (config.in_channels, config.sample_size, config.sample_size)
    return torch.cat([torch.randn((1, *shape), generator=torch.Generator().manual_seed(seed)) for seed in seeds])


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
) -> Trajectories:
    """Draw with `embeds` [R, T, D] from `noise` [R, C, h, w]; from step `redirect_at` [R] on with `redirected` [R, T, D].

    `negative` [1, T, D] is the unconditional embedding. Without `exact` the UNet computes in half precision (bf16 on the
    CPU, where noise predictions then differ by half a percent), in half the time: enough for what detectors learn from.
    What is given and what comes back is on the CPU, wherever the pipeline is.
    """
    parts, chunk = [], CHUNKS.get(pipeline.device.type, CHUNKS["cpu"])
    embeds, negative, noise = (tensor.to(pipeline.device) for tensor in (embeds, negative, noise))
    if redirected is not None and redirect_at is not None:
        redirected, redirect_at = redirected.to(pipeline.device), redirect_at.to(pipeline.device)
    for start in range(0, len(embeds), chunk):
        rows = slice(start, start + chunk)
        switch = None if redirected is None or redirect_at is None else (redirected[rows], redirect_at[rows])
        parts.append(_sample_chunk(pipeline, embeds[rows], negative, noise[rows], steps, guidance_scale, switch, exact))
    latents, finals, timesteps = zip(*parts, strict=True)
    return Trajectories(torch.cat(latents), timesteps[0], torch.cat(finals))


def _sample_chunk(
    pipeline: StableDiffusionPipeline,
    embeds: Tensor,
    negative: Tensor,
    noise: Tensor,
    steps: int,
    guidance_scale: float,
    switch: tuple[Tensor, Tensor] | None,
    exact: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    scheduler: Any = DDIMScheduler.from_config(pipeline.scheduler.config)
    scheduler.set_timesteps(steps)
    latent = noise * scheduler.init_noise_sigma
    uncond = negative.expand(len(embeds), -1, -1)
    seen = []
    for index, timestep in enumerate(scheduler.timesteps):
        seen.append(latent.half())
        prompt = embeds
        if switch is not None:
            prompt = torch.where((switch[1] <= index)[:, None, None], switch[0], embeds)
        with nullcontext() if exact else mixed_precision(latent.device):
            both = pipeline.unet(torch.cat([latent] * 2), timestep, torch.cat([uncond, prompt]), return_dict=False)[0].float()
        without, conditional = both.chunk(2)
        latent = scheduler.step(without + guidance_scale * (conditional - without), timestep, latent).prev_sample
    return torch.stack(seen, dim=1).cpu(), latent.cpu(), scheduler.timesteps.float().cpu()


@torch.no_grad()
def decode(pipeline: StableDiffusionPipeline, latents: Tensor) -> Tensor:
    """Final latents [B, C, h, w] -> pictures [B, 3, H, W] in [-1, 1], on the CPU."""
    chunks = (latents.to(pipeline.device) / pipeline.vae.config.scaling_factor).split(64)
    pictures: Tensor = torch.cat([pipeline.vae.decode(chunk, return_dict=False)[0] for chunk in chunks])
    return pictures.clamp(-1, 1).cpu()
