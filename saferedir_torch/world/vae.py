"""Trains the autoencoder: AutoencoderKL, factor 4, four latent channels (64x64 picture -> 16x16x4 latent)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor

from saferedir_torch.precision import mixed_precision
from saferedir_torch.training_run import Schedule, run_training
from saferedir_torch.world.batches import picture_batch, save_sheet
from saferedir_torch.world.scenes import random_scene

BATCH = 16
#: Pictures whose latents' spread sets the scale.
SCALED_ON = 512
VAE_STEPS = 5000
KL_WEIGHT = 1e-3  # of the divergence per latent element
PEAK_RATE = 2e-3


def new_vae() -> AutoencoderKL:
    """An untrained autoencoder, 0.7 M parameters."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 32, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=64,
        mid_block_add_attention=False,
    )


def train_vae(folder: Path, *, seed: int = 0, steps: int = VAE_STEPS, device: str = "cpu") -> Path:
    """Train, set the scaling factor (1 / std of the latents), save to `folder/vae` and return that path."""
    torch.manual_seed(seed)
    vae = new_vae().to(device)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=PEAK_RATE, weight_decay=1e-4)

    def batch_of(step: int, size: int = BATCH) -> Tensor:
        rng = np.random.default_rng([seed, 1, step])
        return picture_batch([random_scene(rng) for _ in range(size)], rng).to(device)

    def loss_of_step(step: int) -> tuple[Tensor, dict[str, float]]:
        pictures = batch_of(step)
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        with mixed_precision(pictures.device):
            posterior = vae.encode(pictures).latent_dist
            decoded = vae.decode(posterior.sample(generator=generator)).sample
        decoded = decoded.float()
        l1 = F.l1_loss(decoded, pictures)
        loss = l1 + F.mse_loss(decoded, pictures) + 0.5 * gradient_l1(decoded, pictures)
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        return loss + KL_WEIGHT * kl, {"l1": float(l1.detach()), "kl": float(kl.detach())}

    @torch.no_grad()
    def sample(step: int) -> None:
        pictures = batch_of(-1 % 10**9, 24)
        decoded = vae.decode(vae.encode(pictures).latent_dist.mode()).sample
        save_sheet(torch.cat([pictures, decoded]).cpu(), folder / "samples" / f"vae_{step:05d}.png")

    run_training(
        folder=folder,
        name="vae",
        modules={"vae": vae},
        optimizer=optimizer,
        schedule=Schedule(total_steps=steps, warmup_steps=50),
        loss_of_step=loss_of_step,
        sample=sample,
        sample_every=400,
    )
    vae.eval()
    vae.register_to_config(scaling_factor=_scaling_factor(vae, batch_of(10**9 + 1, SCALED_ON)))
    out = folder / "vae"
    vae.save_pretrained(out)
    return out


@torch.no_grad()
def _scaling_factor(vae: AutoencoderKL, pictures: Tensor) -> float:
    latents = torch.cat([vae.encode(chunk).latent_dist.mode() for chunk in torch.split(pictures, 64)])
    return round(1 / float(latents.std()), 4)


def gradient_l1(a: Tensor, b: Tensor) -> Tensor:
    """Mean absolute difference of the pictures' differences between neighbouring pixels; keeps edges sharp."""
    difference = a - b
    rows = (difference[:, :, 1:] - difference[:, :, :-1]).abs().mean()
    return rows + (difference[..., 1:] - difference[..., :-1]).abs().mean()
