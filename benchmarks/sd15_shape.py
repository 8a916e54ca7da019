"""A pipeline of Stable Diffusion 1.5's widths with random weights, to show that the recipe takes it and what memory it needs.

`python -m benchmarks.sd15_shape FOLDER` writes it (2.1 GB in fp16); the tokenizer is the embedded model's. With `--pixels 64`
its pictures are small, so that two cores go the recipe's whole way:
`SAFEREDIR_RECIPE_MODEL=FOLDER python -m pytest --no-cov -m slow tests/test_recipes.py`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from saferedir_torch.models import load_pipeline

#: The public configuration of Stable Diffusion 1.5's UNet.
UNET: dict[str, Any] = {
    "sample_size": 64, "block_out_channels": (320, 640, 1280, 1280), "cross_attention_dim": 768, "attention_head_dim": 8,
    "layers_per_block": 2,
}  # fmt: skip


def build(pixels: int = 512) -> StableDiffusionPipeline:
    """The public configuration of Stable Diffusion 1.5, seeded random weights, in fp16, for pictures of `pixels` a side."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float16)
    try:
        unet = UNet2DConditionModel(**{**UNET, "sample_size": pixels // 8})
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            latent_channels=4,
            layers_per_block=2,
        )
        text = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12
            )
        )
    finally:
        torch.set_default_dtype(torch.float32)
    schedule = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    scheduler = DDIMScheduler(**schedule, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    return StableDiffusionPipeline(
        vae=vae, text_encoder=text, tokenizer=load_pipeline().tokenizer, unet=unet, scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--pixels", type=int, default=512, help="A side of a picture, a multiple of 64.")
    arguments = parser.parse_args()
    build(arguments.pixels).save_pretrained(arguments.folder)


if __name__ == "__main__":
    main()
