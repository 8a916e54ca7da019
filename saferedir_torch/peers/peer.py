"""What all peers share: DDIM with guidance on a stock Stable Diffusion pipeline, in eager PyTorch; LCM on a distilled one.

A peer changes the embeddings, the negative embedding, the guided prediction, the model, or the pictures; this one changes
nothing, and is the model without safety.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, LCMScheduler
from PIL import Image
from torch import Tensor

from saferedir_torch.attacks.suite import Pixels
from saferedir_torch.trajectories import decode, encode, generators_of, initial_noise

#: Pictures drawn at once, on a CPU and on a GPU.
CHUNK, GPU_CHUNK = 16, 256


@dataclass
class Batch:
    """What is being drawn: B prompts, and whatever a peer keeps from step to step."""

    #: [B, T, D].
    embeds: Tensor
    #: [B, T, D], of the negative prompt.
    negative: Tensor
    kept: dict[str, Any] = field(default_factory=dict)


class Peer:
    """The model without safety. Others override what they change."""

    #: What the peer is called in tables.
    name = "no safety"

    def __init__(self, pipeline: Any, *, steps: int = 25, guidance_scale: float = 5.0) -> None:
        """`pipeline` is a Stable Diffusion pipeline; it is not changed."""
        self.pipeline = pipeline
        self.unet = pipeline.unet
        self.steps, self.guidance_scale = steps, guidance_scale

    def begin(self, prompts: Sequence[str], embeds: Tensor) -> Batch:
        """What is kept while `prompts` are drawn, whose embeddings are `embeds` [B, T, D]."""
        return Batch(embeds, self.encode([""]).expand(len(embeds), -1, -1))

    def guided(self, batch: Batch, index: int, timestep: Tensor, latent: Tensor) -> Tensor:
        """The noise to take away in step `index`, [B, C, h, w]."""
        both = self.predict(latent, timestep, batch.negative, batch.embeds)
        return both[0] + self.guidance_scale * (both[1] - both[0])

    def finish(self, prompts: Sequence[str], pictures: Tensor) -> Tensor:
        """The pictures [B, 3, H, W] in [-1, 1] that are handed out."""
        return pictures

    @torch.no_grad()
    def draw(self, prompts: Sequence[str], seeds: Sequence[int], title: str = "") -> Pixels:
        """One picture a prompt and seed, [R, H, W, 3]."""
        return np.concatenate([
            self._draw(prompts[rows], self.encode(prompts[rows]), seeds[rows]) for rows in self._chunks(len(prompts))
        ])  # fmt: skip

    @torch.no_grad()
    def draw_embeddings(self, embeds: Tensor, seeds: Sequence[int]) -> Pixels:
        """One picture an embedding [R, T, D], whatever text it may be of, and seed: [R, H, W, 3]."""
        return np.concatenate([
            self._draw([""] * len(seeds[rows]), embeds[rows].to(self.pipeline.device), seeds[rows])
            for rows in self._chunks(len(seeds))
        ])  # fmt: skip

    def generate(self, prompts: Sequence[str], seed: int | None = None, **_: Any) -> list[Image.Image]:
        """As the `eval-unlearn` package asks for it; the seeds count up from `seed`."""
        pixels = self.draw(list(prompts), [(seed or 0) + row for row in range(len(prompts))])
        return [Image.fromarray(picture) for picture in pixels]

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """[B, T, D] on the model's device."""
        _, embeds = encode(self.pipeline, list(prompts))
        return embeds.to(self.pipeline.device)

    def predict(self, latent: Tensor, timestep: Tensor, *embeds: Tensor) -> tuple[Tensor, ...]:
        """The UNet's prediction for each of `embeds` [B, T, D], in one call."""
        latents, prompts = torch.cat([latent] * len(embeds)), torch.cat(embeds)
        predicted: Tensor = self.unet(latents, timestep, prompts, return_dict=False)[0]
        return predicted.chunk(len(embeds))

    def _chunks(self, count: int) -> list[slice]:
        size = CHUNK if self.pipeline.device.type == "cpu" else GPU_CHUNK
        return [slice(start, start + size) for start in range(0, count, size)]

    def _draw(self, prompts: Sequence[str], embeds: Tensor, seeds: Sequence[int]) -> Pixels:
        batch = self.begin(prompts, embeds)
        few_steps = isinstance(self.pipeline.scheduler, LCMScheduler)
        scheduler: Any = (LCMScheduler if few_steps else DDIMScheduler).from_config(self.pipeline.scheduler.config)
        scheduler.set_timesteps(self.steps)
        generators = generators_of(self.pipeline, seeds)  # of noise that a scheduler adds in a step
        latent = initial_noise(self.pipeline, list(seeds)).to(self.pipeline.device) * scheduler.init_noise_sigma
        for index, timestep in enumerate(scheduler.timesteps):
            latent = scheduler.step(
                self.guided(batch, index, timestep, latent), timestep, latent, generator=generators
            ).prev_sample
        pictures = self.finish(prompts, decode(self.pipeline, latent))
        rounded = ((pictures / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
        return np.asarray(rounded.permute(0, 2, 3, 1).numpy(), np.uint8)
