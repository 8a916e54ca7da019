"""UNets of the shapes of models that are in use, without weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.utils import logging as diffusers_logging
from torch import Tensor, nn

from benchmarks.sd15_shape import UNET as SD15

#: The public configuration of SDXL base 1.0's UNet.
SDXL: dict[str, Any] = {
    "sample_size": 128, "block_out_channels": (320, 640, 1280), "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": (5, 10, 20), "transformer_layers_per_block": (1, 2, 10), "use_linear_projection": True,
    "cross_attention_dim": 2048, "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}  # fmt: skip
#: No more than a dry run needs.
TINY: dict[str, Any] = {
    "sample_size": 16, "norm_num_groups": 8, "layers_per_block": 1, "cross_attention_dim": 32, "block_out_channels": (16,),
    "attention_head_dim": 2, "down_block_types": ("CrossAttnDownBlock2D",), "mid_block_type": None,
    "up_block_types": ("UpBlock2D",),
}  # fmt: skip
TOLD = {"transformer_layers_per_block": 1, "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 80}


@dataclass(frozen=True)
class Shape:
    """A UNet's configuration, and what it is called in tables."""

    name: str
    title: str
    unet: dict[str, Any]
    tokens: int

    @property
    def width(self) -> int:
        """Of the prompt's embedding."""
        return int(self.unet["cross_attention_dim"])

    @property
    def side(self) -> int:
        """Height and width of the latent."""
        return int(self.unet["sample_size"])


def shapes(*, tiny: bool) -> tuple[Shape, ...]:
    """Stable Diffusion 1.5's and SDXL's; with `tiny` as much of either as a dry run needs."""
    sd15, sdxl = (SD15 | TINY, SDXL | TINY | TOLD) if tiny else (SD15, SDXL)
    tokens = 8 if tiny else 77
    return Shape("sd15", "Stable Diffusion 1.5's shape", sd15, tokens), Shape("sdxl", "SDXL's shape", sdxl, tokens)


def build_unet(shape: Shape) -> nn.Module:
    """The UNet, on the device `meta`: it takes no memory until weights are put in."""
    diffusers_logging.set_verbosity_error()  # casts and unknown devices, which are as they should be
    with torch.device("meta"):
        unet = UNet2DConditionModel(**shape.unet).eval().requires_grad_(False)
    return ToldOfSize(unet) if shape.unet.get("addition_embed_type") == "text_time" else unet


class ToldOfSize(nn.Module):
    """SDXL's UNet with what it is told beside tokens as constants: a pooled prompt, and the sizes of the picture."""

    text_embeds: Tensor
    time_ids: Tensor

    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.unet = unet
        config, pixels = unet.config, 8.0 * unet.config.sample_size
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        self.register_buffer("text_embeds", torch.linspace(-1, 1, pooled)[None], persistent=False)
        self.register_buffer("time_ids", torch.tensor([[pixels, pixels, 0, 0, pixels, pixels]]), persistent=False)

    @property
    def config(self) -> Any:
        return self.unet.config

    @property
    def dtype(self) -> torch.dtype:
        found: torch.dtype = self.unet.conv_in.weight.dtype
        return found

    def forward(self, latent: Tensor, timestep: Tensor, prompt_embeds: Tensor, return_dict: bool = False) -> tuple[Tensor, ...]:
        # As floats, which diffusers joins with the sizes' embedding, whatever the rest is in; and added to nothing rather than
        # repeated, since a constant is repeated by arithmetic on the batch's size, which ends capture in a CUDA graph.
        nothing = 0 * timestep[:, None]
        told = {"text_embeds": self.text_embeds.float() + nothing, "time_ids": self.time_ids.float() + nothing}
        drawn: tuple[Tensor, ...] = self.unet(latent, timestep, prompt_embeds, added_cond_kwargs=told, return_dict=return_dict)
        return drawn
