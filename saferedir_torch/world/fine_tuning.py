"""Models made of the embedded one, to try its safety on unchanged: fine-tuned on other pictures, and distilled to few steps.

The text encoder stays as it is, as it does in most fine-tunes; a safety module reads its embeddings.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from diffusers import LCMScheduler
from torch import Tensor

from saferedir_torch.models import SHIPPED_MODEL, load_pipeline
from saferedir_torch.precision import mixed_precision
from saferedir_torch.training_run import ExponentialAverage, Schedule, run_training
from saferedir_torch.world.base import denoising_loss, draw_prompts, tokenize
from saferedir_torch.world.batches import save_sheet
from saferedir_torch.world.captions import caption
from saferedir_torch.world.scenes import Scene, draw, random_scene, scattered

BATCH = 48
BANK_SIZE = 8000
TUNE_STEPS, DISTIL_STEPS = 1200, 1500
EMPTY_PROMPT_SHARE = 0.1
RATE = 3e-4
#: Of the fine-tune on one style, whatever the caption says of style.
STYLE = "sepia"
SAMPLE_PROMPTS = (
    "a church", "a house next to a cat", "a dagger on teal", "a balloon as a sticker", "a dog in ink style", "a crown",
)  # fmt: skip

Painter = Callable[[Scene, np.random.Generator], npt.NDArray[np.uint8]]
KINDS: dict[str, Painter] = {
    "one-style": lambda scene, rng: draw(replace(scene, style=STYLE), rng),
    "changed-pictures": scattered,
}
#: Of consistency distillation (Luo et al. 2023, arXiv 2310.04378): the teacher's guidance, its DDIM steps, sigma_data and the
#: scaling of timesteps of the boundary condition, and the Huber loss's c.
GUIDANCE, SOLVER_STEPS, SIGMA_DATA, TIME_SCALE, HUBER = 5.0, 50, 0.5, 10.0, 1e-3


@dataclass(frozen=True)
class Bank:
    """Scaled latents of pictures [N, C, h, w] and what they show, drawn from `seed`."""

    latents: Tensor
    scenes: list[Scene]

    @classmethod
    def painted(cls, pipeline: Any, paint: Painter, size: int, seed: int) -> Bank:
        """`size` random scenes as `paint` paints them."""
        scenes = [random_scene(np.random.default_rng([seed, 71, row])) for row in range(size)]
        parts = []
        with torch.no_grad(), mixed_precision(pipeline.device):
            for start in range(0, size, 100):
                rng = np.random.default_rng([seed, 72, start])
                pixels = torch.from_numpy(np.stack([paint(scene, rng) for scene in scenes[start : start + 100]]))
                pictures = pixels.permute(0, 3, 1, 2).to(pipeline.device).float() / 127.5 - 1
                parts.append(pipeline.vae.encode(pictures).latent_dist.mode().float() * pipeline.vae.config.scaling_factor)
        return cls(torch.cat(parts), scenes)

    def batch(self, pipeline: Any, seed: int, step: int, empty_share: float) -> tuple[Tensor, Tensor, torch.Generator]:
        """Latents and prompt embeddings of one step, and a generator for its noise."""
        rng = np.random.default_rng([seed, 73, step])
        rows = rng.integers(len(self.scenes), size=BATCH)
        prompts = ["" if rng.random() < empty_share else caption(self.scenes[row], rng) for row in rows]
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        return self.latents[torch.from_numpy(rows)], _embeds(pipeline, prompts), generator


def fine_tune(
    kind: str, folder: Path, *, seed: int = 0, steps: int = TUNE_STEPS, base: Path = SHIPPED_MODEL, size: int = BANK_SIZE
) -> Path:
    """The model in `base` trained on with pictures of `kind`, one of `KINDS`; saved to `folder/model`, samples beside it."""
    pipeline = load_pipeline(base)
    bank = Bank.painted(pipeline, KINDS[kind], size, seed)
    average = ExponentialAverage(pipeline.unet, decay=0.995)

    def loss_of_step(step: int) -> tuple[Tensor, dict[str, float]]:
        latents, embeds, generator = bank.batch(pipeline, seed, step, EMPTY_PROMPT_SHARE)
        return denoising_loss(pipeline.unet, pipeline.scheduler, latents, embeds, generator)

    _train(pipeline, folder, loss_of_step, average, steps)
    return _save(pipeline, average, folder, steps=25, guidance_scale=5.0)


def distil(
    folder: Path, *, seed: int = 0, steps: int = DISTIL_STEPS, base: Path = SHIPPED_MODEL, size: int = BANK_SIZE
) -> Path:
    """The model in `base` distilled to draw in four steps without guidance, by latent consistency; saved to `folder/model`."""
    pipeline = load_pipeline(base)
    teacher, average = copy.deepcopy(pipeline.unet).requires_grad_(False), ExponentialAverage(pipeline.unet, decay=0.95)
    target = copy.deepcopy(teacher)
    bank = Bank.painted(pipeline, draw, size, seed)
    empty = _embeds(pipeline, [""])
    stride = len(pipeline.scheduler.alphas_cumprod) // SOLVER_STEPS
    alphas = pipeline.scheduler.alphas_cumprod

    def loss_of_step(step: int) -> tuple[Tensor, dict[str, float]]:
        latents, embeds, generator = bank.batch(pipeline, seed, step, 0.0)
        later = torch.randint(1, SOLVER_STEPS + 1, (BATCH,), generator=generator) * stride - 1
        earlier = (later - stride).clamp(min=0)
        noisy = pipeline.scheduler.add_noise(latents, torch.randn(latents.shape, generator=generator), later)
        target.load_state_dict({**target.state_dict(), **average.state_dict()})
        with torch.no_grad():
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

    _train(pipeline, folder, loss_of_step, average, steps)
    pipeline.scheduler = LCMScheduler.from_config(pipeline.scheduler.config)
    return _save(pipeline, average, folder, steps=4, guidance_scale=1.0)


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


@torch.no_grad()
def _embeds(pipeline: Any, prompts: list[str]) -> Tensor:
    embeds: Tensor = pipeline.text_encoder(tokenize(pipeline.tokenizer, prompts)).last_hidden_state
    return embeds


def _train(
    pipeline: Any, folder: Path, loss_of_step: Callable[[int], tuple[Tensor, dict[str, float]]], average: ExponentialAverage,
    steps: int,
) -> None:  # fmt: skip
    def loss(step: int) -> tuple[Tensor, dict[str, float]]:
        with mixed_precision(pipeline.device):
            return loss_of_step(step)

    run_training(
        folder=folder, name="unet", modules={"unet": pipeline.unet},
        optimizer=torch.optim.AdamW(pipeline.unet.parameters(), lr=RATE, weight_decay=0.01),
        schedule=Schedule(total_steps=steps, warmup_steps=50), loss_of_step=loss, averages={"unet": average},
    )  # fmt: skip


def _save(pipeline: Any, average: ExponentialAverage, folder: Path, *, steps: int, guidance_scale: float) -> Path:
    pipeline.unet.load_state_dict({**pipeline.unet.state_dict(), **average.state_dict()})
    pipeline.unet.eval()
    prompts = list(SAMPLE_PROMPTS * 2)
    drawn = draw_prompts(pipeline, prompts, range(len(prompts)), steps=steps, guidance_scale=guidance_scale)
    save_sheet(drawn, folder / "samples.png", columns=len(SAMPLE_PROMPTS))
    out = folder / "model"
    pipeline.to(torch.float16).save_pretrained(out)
    return out
