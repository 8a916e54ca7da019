"""Small pipelines of Stable Diffusion's true classes with random weights, for tests of the exporter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    SchedulerMixin,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

from saferedir_torch.models import SHIPPED_MODEL, load_pipeline, save_in_half
from saferedir_torch.new_module import new_module
from saferedir_torch.world.base import new_scheduler
from saferedir_torch.world.source import WorldPrompts
from saferedir_torch.world.split import load_split

#: Widths of a safety module that goes with them.
SMALL: dict[str, Any] = {"convolutions": (8, 8, 16), "features": 16, "heads": 2}


def save_small_pipeline(
    folder: Path, *, width: int, heads: int, two_levels: bool = False, pad_token: str | None = None,
    scheduler: SchedulerMixin | None = None, text_layers: int = 1,
    told_width: int | None = None, kind: type[DiffusionPipeline] = StableDiffusionPipeline,
) -> Path:  # fmt: skip
    """Write a pipeline whose prompt embedding is `width` wide, in fp16, with the embedded model's words.

    With `two_levels` its UNet has all that Stable Diffusion's has, a middle included; else no more than a trace needs.
    `told_width` is that of a latent consistency model's embedding of the guidance scale.
    """
    torch.manual_seed(0)
    padding = {} if pad_token is None else {"pad_token": pad_token}
    tokenizer = CLIPTokenizer.from_pretrained(SHIPPED_MODEL / "tokenizer", **padding)
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=width, intermediate_size=64, num_hidden_layers=text_layers,
            num_attention_heads=heads, eos_token_id=tokenizer.eos_token_id, bos_token_id=tokenizer.bos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=16, block_out_channels=(16, 32) if two_levels else (16,), layers_per_block=1, cross_attention_dim=width,
        attention_head_dim=2, norm_num_groups=8, time_cond_proj_dim=told_width,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D") if two_levels else ("CrossAttnDownBlock2D",),
        mid_block_type="UNetMidBlock2DCrossAttn" if two_levels else None,
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D") if two_levels else ("UpBlock2D",),
    )  # fmt: skip
    pipeline = kind(
        vae=small_vae(), text_encoder=text, tokenizer=tokenizer, unet=unet, scheduler=scheduler or new_scheduler(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    save_in_half(pipeline, folder)
    return folder


def save_small_safety(model: Path, folder: Path) -> Path:
    """Write to `folder` a safety module with random weights for the pipeline in `model`, of one concept, a church."""
    pipeline = load_pipeline(model)
    torch.manual_seed(1)
    new_module(pipeline, WorldPrompts(["church"], load_split()), 0, **SMALL).save(folder)
    return folder


def small_vae() -> AutoencoderKL:
    """A VAE of the true class that halves pictures once, the same in every pipeline."""
    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(8, 8), norm_num_groups=4, sample_size=32, mid_block_add_attention=False,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip


def save_first(folder: Path) -> Path:
    """A folder of the kind of Stable Diffusion 1, with two levels."""
    return save_small_pipeline(folder, width=32, heads=2, two_levels=True)


def save_second(folder: Path) -> Path:
    """A folder with what sets Stable Diffusion 2 apart: width 1024, velocity prediction, its own padding."""
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1, prediction_type="v_prediction",
    )  # fmt: skip
    return save_small_pipeline(folder, width=1024, heads=16, pad_token="!", scheduler=scheduler)


def save_turbo(folder: Path) -> Path:
    """A folder with the sampler of a model that draws in one to four steps, unguided, as SD-Turbo does."""
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="trailing", steps_offset=1
    )
    return save_small_pipeline(folder, width=32, heads=2, scheduler=scheduler)


def save_consistency(folder: Path) -> Path:
    """A folder of a latent consistency model, whose UNet is told the guidance scale."""
    scheduler = LCMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=True,
    )  # fmt: skip
    return save_small_pipeline(
        folder, width=32, heads=2, told_width=9, kind=LatentConsistencyModelPipeline, scheduler=scheduler
    )


def save_pixart(folder: Path) -> Path:
    """A folder of a PixArt model: T5 for its prompts, a transformer that says its variance as well."""
    torch.manual_seed(0)
    pieces = [
        "<pad>",
        "</s>",
        "<unk>",
        *(f"\u2581{word}" for word in ("a", "church", "cat", "castle", "on", "blue", "in", "ink")),
    ]
    pieces += ["\u2581", *"abcdefghijklmnopqrstuvwxyz"]
    tokenizer = T5Tokenizer(vocab=[(piece, -float(len(piece) < 2)) for piece in pieces], extra_ids=0)
    text = T5EncoderModel(
        T5Config(vocab_size=len(tokenizer), d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2, dropout_rate=0.0)
    )
    transformer = PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, num_layers=1, cross_attention_dim=32, caption_channels=32,
        sample_size=16, attention_bias=True,
    )  # fmt: skip
    scheduler = DDIMScheduler(beta_start=0.0001, beta_end=0.02, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    pipeline = PixArtAlphaPipeline(
        tokenizer=tokenizer, text_encoder=text, vae=small_vae(), transformer=transformer, scheduler=scheduler
    )
    pipeline.to(torch.float16).save_pretrained(folder)
    return folder
