"""Models of the same world that differ from the embedded one in architecture, to see what of its safety carries over.

Each keeps what it does not change: `other-vae` the text encoder, `wider-text` the autoencoder, `transformer` both. UNets start
from the embedded one where shapes fit.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, PixArtAlphaPipeline, PixArtTransformer2DModel, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel

from saferedir_torch.models import SHIPPED_MODEL, load_pipeline
from saferedir_torch.pixart import Denoiser, PixArt
from saferedir_torch.training_run import ExponentialAverage
from saferedir_torch.warm_start import start_from
from saferedir_torch.world.base import denoising_loss
from saferedir_torch.world.clip import ImageTower, fit_towers, new_text_encoder
from saferedir_torch.world.denoiser_training import Bank, embed, save_model, save_samples, train_denoiser
from saferedir_torch.world.scenes import draw
from saferedir_torch.world.vae import train_vae

BANK_SIZE = 48_000
RATE = 6e-4
#: Prompt width of `wider-text`.
WIDER = 192
#: Keeps random numbers apart from those that the embedded model was made with.
SEED_OFFSET = 100


@dataclass(frozen=True)
class Architecture:
    """How one is made: `build(pipeline, folder, seed, part_steps)` changes what is to change and returns the parts that
    the denoiser is then trained with, for `steps`."""

    build: Callable[[Any, Path, int, int], Any]
    steps: int
    #: Steps that a new autoencoder or text encoder is trained for beforehand.
    part_steps: int = 0
    #: Learning rate of the text encoder beside the denoiser; None keeps it as it is.
    text_rate: float | None = None


def _other_vae(pipeline: Any, folder: Path, seed: int, part_steps: int) -> Any:
    """An autoencoder of the same shape and another seed, trained anew: other latents, at a scale of their own."""
    trained = train_vae(folder, seed=seed + SEED_OFFSET, steps=part_steps, device=str(pipeline.device))
    pipeline.register_modules(vae=AutoencoderKL.from_pretrained(trained).to(pipeline.device))
    return pipeline


def _wider_text(pipeline: Any, folder: Path, seed: int, part_steps: int) -> Any:
    """A text encoder of another width, and velocity as what is predicted: as Stable Diffusion 2 differs from 1."""
    torch.manual_seed(seed + SEED_OFFSET)
    text = new_text_encoder(pipeline.tokenizer, WIDER).to(pipeline.device)
    image = ImageTower().to(pipeline.device)
    fit_towers(text, image, pipeline.tokenizer, folder, name="clip", seed=seed + SEED_OFFSET, stream=8, steps=part_steps)
    text.eval().save_pretrained(folder / "clip")
    unet = UNet2DConditionModel.from_config({**pipeline.unet.config, "cross_attention_dim": WIDER})
    start_from(unet, pipeline.unet.state_dict())
    pipeline.register_modules(
        text_encoder=CLIPTextModel.from_pretrained(folder / "clip").to(pipeline.device),
        unet=unet.to(pipeline.device),
        scheduler=DDIMScheduler.from_config(pipeline.scheduler.config, prediction_type="v_prediction"),
    )
    return pipeline


def _transformer(pipeline: Any, folder: Path, seed: int, part_steps: int) -> Any:
    """A PixArt transformer (arXiv 2310.00426) in the UNet's place: 8 layers of 8 heads, 9.1 M parameters."""
    torch.manual_seed(seed + SEED_OFFSET)
    heads, width = 8, 32
    transformer = PixArtTransformer2DModel(
        num_layers=8, num_attention_heads=heads, attention_head_dim=width, cross_attention_dim=heads * width,
        caption_channels=pipeline.unet.config.cross_attention_dim, in_channels=4, out_channels=4, sample_size=16, patch_size=2,
    )  # fmt: skip
    return PixArt(
        unet=Denoiser(transformer).to(pipeline.device), text_encoder=pipeline.text_encoder, vae=pipeline.vae,
        tokenizer=pipeline.tokenizer, scheduler=pipeline.scheduler,
    )  # fmt: skip


ARCHITECTURES: dict[str, Architecture] = {
    "other-vae": Architecture(_other_vae, steps=2400, part_steps=5000),
    "wider-text": Architecture(_wider_text, steps=3600, part_steps=1000, text_rate=3e-4),
    "transformer": Architecture(_transformer, steps=6000),
}


def make(
    kind: str, folder: Path, *, seed: int = 0, steps: int | None = None, part_steps: int | None = None,
    base: Path = SHIPPED_MODEL, size: int = BANK_SIZE, device: str = "cpu",
) -> Path:  # fmt: skip
    """A model of `kind`, one of `ARCHITECTURES`, trained on the world's pictures; in `folder/model`, samples beside it."""
    own = ARCHITECTURES[kind]
    folder.mkdir(parents=True, exist_ok=True)
    shipped = load_pipeline(base).to(torch.device(device))
    pipeline = own.build(shipped, folder, seed, own.part_steps if part_steps is None else part_steps)
    bank = Bank.painted(pipeline, draw, size, seed + SEED_OFFSET)

    def loss_of_step(step: int) -> tuple[Tensor, dict[str, float]]:
        latents, prompts, generator = bank.batch(seed + SEED_OFFSET, step)
        with torch.no_grad() if own.text_rate is None else nullcontext():
            embeds = embed(pipeline, prompts)
        return denoising_loss(pipeline.unet, pipeline.scheduler, latents, embeds, generator)

    average = ExponentialAverage(pipeline.unet, decay=0.999)
    train_denoiser(
        pipeline, folder, loss_of_step, average, steps=own.steps if steps is None else steps, rate=RATE, text_rate=own.text_rate
    )
    save_samples(pipeline, folder)
    return save_model(_diffusers(pipeline), folder)


def _diffusers(pipeline: Any) -> Any:
    """The pipeline that saves itself."""
    if not isinstance(pipeline, PixArt):
        return pipeline
    return PixArtAlphaPipeline(
        transformer=pipeline.unet.transformer, text_encoder=pipeline.text_encoder, vae=pipeline.vae,
        tokenizer=pipeline.tokenizer, scheduler=pipeline.scheduler,
    )  # fmt: skip
