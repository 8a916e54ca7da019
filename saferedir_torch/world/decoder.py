"""Tunes the VAE's decoder to latents that are a little off, as a diffusion model leaves them; the encoder stays."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor

from saferedir_torch.training_run import Schedule, run_training
from saferedir_torch.world.batches import picture_batch, save_sheet
from saferedir_torch.world.scenes import random_scene
from saferedir_torch.world.vae import gradient_l1

BATCH = 32
#: Largest noise on a latent, in units of the scaled latents' standard deviation.
LARGEST_NOISE = 0.25


def train_decoder(folder: Path, *, seed: int = 0, steps: int = 500) -> Path:
    """Tune `folder/vae`'s decoder on noisy latents, save the whole autoencoder to `folder/vae-tuned`, return that path."""
    vae = AutoencoderKL.from_pretrained(folder / "vae")
    vae.encoder.requires_grad_(False)
    vae.quant_conv.requires_grad_(False)
    parameters = [p for p in vae.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=1e-4)
    spread = 1 / vae.config.scaling_factor

    def noisy(step: int) -> tuple[Tensor, Tensor]:
        rng = np.random.default_rng([seed, 6, step])
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        pictures = picture_batch([random_scene(rng) for _ in range(BATCH)], rng)
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            latents = vae.encode(pictures).latent_dist.mode().float()
        amount = torch.rand(BATCH, 1, 1, 1, generator=generator) * LARGEST_NOISE * spread
        return pictures, latents + amount * torch.randn(latents.shape, generator=generator)

    def loss_of_step(step: int) -> tuple[Tensor, dict[str, float]]:
        pictures, latents = noisy(step)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            decoded = vae.decode(latents).sample.float()
        l1 = F.l1_loss(decoded, pictures)
        loss = l1 + F.mse_loss(decoded, pictures) + 0.5 * gradient_l1(decoded, pictures)
        return loss, {"l1": float(l1.detach())}

    @torch.no_grad()
    def sample(step: int) -> None:
        pictures, latents = noisy(10**9)
        save_sheet(torch.cat([pictures, vae.decode(latents).sample]), folder / "samples" / f"decoder_{step:05d}.png", 16)

    run_training(
        folder=folder,
        name="decoder",
        modules={"vae": vae},
        optimizer=optimizer,
        schedule=Schedule(total_steps=steps, warmup_steps=50),
        loss_of_step=loss_of_step,
        sample=sample,
        sample_every=250,
    )
    out = folder / "vae-tuned"
    vae.eval().save_pretrained(out)
    return out
