"""Models made of the embedded one, to try its safety on unchanged: fine-tuned on other pictures, and distilled to few steps.

The text encoder stays as it is, as it does in most fine-tunes; a safety module reads its embeddings.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import LCMScheduler
from torch import Tensor

from saferedir_torch.models import SHIPPED_MODEL, load_pipeline
from saferedir_torch.training_run import ExponentialAverage
from saferedir_torch.world.base import denoising_loss
from saferedir_torch.world.denoiser_training import BATCH, Bank, embed, save_model, save_samples, train_denoiser
from saferedir_torch.world.scenes import Painter, draw, scattered

BANK_SIZE = 8000
TUNE_STEPS, DISTIL_STEPS = 1200, 1500
RATE = 3e-4
#: Of the fine-tune on one style, whatever the caption says of style.
STYLE = "sepia"
KINDS: dict[str, Painter] = {
    "one-style": lambda scene, rng: draw(replace(scene, style=STYLE), rng),
    "changed-pictures": scattered,
}
#: Of consistency distillation (Luo et al. 2023, arXiv 2310.04378): the teacher's guidance, its DDIM steps, sigma_data and the
#: scaling of timesteps of the boundary condition, and the Huber loss's c.
GUIDANCE, SOLVER_STEPS, SIGMA_DATA, TIME_SCALE, HUBER = 5.0, 50, 0.5, 10.0, 1e-3


def fine_tune(
    kind: str, folder: Path, *, seed: int = 0, steps: int = TUNE_STEPS, base: Path = SHIPPED_MODEL, size: int = BANK_SIZE,
    device: str = "cpu",
) -> Path:  # fmt: skip
    """The model in `base` trained on with pictures of `kind`, one of `KINDS`; saved to `folder/model`, samples beside it."""
    pipeline = load_pipeline(base).to(torch.device(device))
    bank = Bank.painted(pipeline, KINDS[kind], size, seed)

    def loss_of_step(step: int) -> tuple[Tensor, dict[str, float]]:
        latents, prompts, generator = bank.batch(seed, step)
        with torch.no_grad():
            embeds = embed(pipeline, prompts)
        return denoising_loss(pipeline.unet, pipeline.scheduler, latents, embeds, generator)

    average = ExponentialAverage(pipeline.unet, decay=0.995)
    train_denoiser(pipeline, folder, loss_of_step, average, steps=steps, rate=RATE)
    save_samples(pipeline, folder)
    return save_model(pipeline, folder)


def distil(
    folder: Path, *, seed: int = 0, steps: int = DISTIL_STEPS, base: Path = SHIPPED_MODEL, size: int = BANK_SIZE,
    device: str = "cpu",
) -> Path:  # fmt: skip
    """The model in `base` distilled to draw in four steps without guidance, by latent consistency; saved to `folder/model`."""
    pipeline = load_pipeline(base).to(torch.device(device))
    teacher, average = copy.deepcopy(pipeline.unet).requires_grad_(False), ExponentialAverage(pipeline.unet, decay=0.95)
    target = copy.deepcopy(teacher)
    bank = Bank.painted(pipeline, draw, size, seed)
    with torch.no_grad():
        empty = embed(pipeline, [""])
    alphas = pipeline.scheduler.alphas_cumprod.to(pipeline.device)
    stride = len(alphas) // SOLVER_STEPS

    def loss_of_step(step: int) -> tuple[Tensor, dict[str, float]]:
        latents, prompts, generator = bank.batch(seed, step, empty_share=0.0)
        later = (torch.randint(1, SOLVER_STEPS + 1, (BATCH,), generator=generator) * stride - 1).to(latents.device)
        earlier = (later - stride).clamp(min=0)
        noise = torch.randn(latents.shape, generator=generator).to(latents.device)
        noisy = pipeline.scheduler.add_noise(latents, noise, later)
        target.load_state_dict({**target.state_dict(), **average.state_dict()})
        with torch.no_grad():
            embeds = embed(pipeline, prompts)
            both = teacher(
                torch.cat([noisy] * 2), torch.cat([later] * 2), torch.cat([empty.expand_as(embeds), embeds]), return_dict=False
            )[0].float()
            without, conditional = both.chunk(2)
            guided = without + GUIDANCE * (conditional - without)
            clean = _clean(noisy, guided, alphas[later])
            a = alphas[earlier].view(-1, 1, 1, 1)
            solved = a.sqrt() * clean + (1 - a).sqrt() * guided
            wanted = _consistent(target, solved, earlier, embeds, alphas)
        got = _consistent(pipeline.unet, noisy, later, embeds, alphas)
        loss = ((got - wanted).square() + HUBER**2).sqrt().mean() - HUBER
        return loss, {"distance": float((got - wanted).detach().square().mean())}

    train_denoiser(pipeline, folder, loss_of_step, average, steps=steps, rate=RATE)
    pipeline.scheduler = LCMScheduler.from_config(pipeline.scheduler.config)
    save_samples(pipeline, folder, steps=4, guidance_scale=1.0)
    return save_model(pipeline, folder)


def _consistent(unet: Any, latents: Tensor, timesteps: Tensor, embeds: Tensor, alphas: Tensor) -> Tensor:
    """f = c_skip z + c_out x0, which is z itself at timestep 0."""
    scaled = (timesteps.float() * TIME_SCALE).view(-1, 1, 1, 1)
    skip = SIGMA_DATA**2 / (scaled.square() + SIGMA_DATA**2)
    out = scaled / (scaled.square() + SIGMA_DATA**2).sqrt()
    noise = unet(latents, timesteps, embeds, return_dict=False)[0].float()
    return skip * latents + out * _clean(latents, noise, alphas[timesteps])


def _clean(latents: Tensor, noise: Tensor, alphas: Tensor) -> Tensor:
    a = alphas.view(-1, 1, 1, 1)
    return (latents - (1 - a).sqrt() * noise) / a.sqrt()
