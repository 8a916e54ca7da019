"""The engines of a model that no safety has a part in. One wrapper module each: it names the tensors and changes nothing.

A model in half precision is given its own type; the tensors of every engine are fp32, and so are guidance and sampler.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from saferedir.engines.manifest import sized
from saferedir.engines.step import NUMBERS, Form, engine_outputs
from saferedir.export.engine_graph import EXAMPLE_BATCH, Graph, StepModule, graph, step_example, step_graph

Size = tuple[int, int]


class TextEncoderGraph(nn.Module):
    """input_ids [B, T] int32 -> prompt_embeds [B, T, D]."""

    def __init__(self, text_encoder: nn.Module) -> None:
        super().__init__()
        self.text_encoder = text_encoder

    def forward(self, input_ids: Tensor) -> Tensor:
        embeds: Tensor = self.text_encoder(input_ids).last_hidden_state
        return embeds.float()


class UNetGraph(nn.Module):
    """latent [B, C, h, w], timestep [B], prompt_embeds [B, T, D] -> model_output [B, C, h, w]."""

    def __init__(self, unet: Any, part: str = "unet") -> None:
        super().__init__()
        self.unet = unet
        self.part = part

    def forward(self, latent: Tensor, timestep: Tensor, prompt_embeds: Tensor) -> Tensor:
        dtype = self.unet.dtype
        output: Tensor = self.unet(latent.to(dtype), timestep, prompt_embeds.to(dtype), return_dict=False)[0]
        return output.float()

    def output_shapes(self, latent: Tensor, *_: Tensor) -> list[tuple[torch.dtype, Any]]:
        return [(torch.float32, latent.shape)]


class GuidedUNetGraph(nn.Module):
    """Of a latent consistency model, which is told the guidance scale [B] and called once."""

    def __init__(self, unet: Any, part: str = "unet") -> None:
        super().__init__()
        self.unet = unet
        self.part = part

    def forward(self, latent: Tensor, timestep: Tensor, prompt_embeds: Tensor, guidance_scale: Tensor) -> Tensor:
        dtype = self.unet.dtype
        told = guidance_embedding(guidance_scale - 1, self.unet.config.time_cond_proj_dim).to(dtype)
        output: Tensor = self.unet(latent.to(dtype), timestep, prompt_embeds.to(dtype), timestep_cond=told, return_dict=False)[
            0
        ]
        return output.float()

    def output_shapes(self, latent: Tensor, *_: Tensor) -> list[tuple[torch.dtype, Any]]:
        return [(torch.float32, latent.shape)]


def guidance_embedding(guidance: Tensor, width: int) -> Tensor:
    """Sines and cosines of w = guidance scale - 1 [B] -> [B, width] (latent consistency models, arXiv 2310.04378)."""
    half = width // 2
    frequencies = torch.exp(torch.arange(half, dtype=torch.float32, device=guidance.device) * -(math.log(10_000) / (half - 1)))
    angles = 1000 * guidance[:, None] * frequencies
    return torch.nn.functional.pad(torch.cat([torch.sin(angles), torch.cos(angles)], dim=1), (0, width % 2))


def unet_graph(unet: Any, part: str = "unet") -> UNetGraph | GuidedUNetGraph:
    """The graph of a UNet, of whichever kind it is."""
    return GuidedUNetGraph(unet, part) if unet.config.get("time_cond_proj_dim") else UNetGraph(unet, part)


class VaeDecoderGraph(nn.Module):
    """latent [B, C, h, w] as the loop leaves it -> image [B, 3, H, W] in [0, 1]."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, latent: Tensor) -> Tensor:
        scaled = (latent / self.vae.config.scaling_factor).to(self.vae.dtype)
        decoded = self.vae.decode(scaled, return_dict=False)[0].float()
        image: Tensor = (decoded / 2 + 0.5).clamp(0, 1)
        return image


class PlainStepGraph(StepModule):
    """The same step without safety, for an operator who switched it off, and to prove what safety leaves untouched."""

    def __init__(self, unet: Any, *, guided: bool, part: str = "unet") -> None:
        super().__init__(Form.PLAIN)
        self.unet = unet_graph(unet, part)
        self.guided = guided
        self.told = isinstance(self.unet, GuidedUNetGraph)

    def compute(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return self.drawn(tensors, tensors["latent"] * tensors["input_scale"])

    def drawn(self, tensors: dict[str, Tensor], seen: Tensor) -> dict[str, Tensor]:
        """The same where `seen` [B, C, h, w], what the UNet is given, is known."""
        latent = tensors["latent"]
        denoised = tensors["from_latent"] * latent + tensors["from_output"] * self.output(tensors, seen)
        # A sum over four in one kernel, in place of four products and three sums.
        parts = torch.stack([latent, denoised, tensors["denoised"], tensors["noise"]], dim=1)
        factors = tensors["numbers"][:, NUMBERS.index("of_latent") : NUMBERS.index("of_noise") + 1, None, None, None]
        return {"next_latent": (parts * factors).sum(dim=1), "next_denoised": denoised}

    def output(self, tensors: dict[str, Tensor], seen: Tensor) -> Tensor:
        """The UNet's output [B, C, h, w], guided where the step is."""
        timestep, prompt = tensors["timestep"], tensors["prompt"]
        if self.told:
            told: Tensor = self.unet(seen, timestep, prompt, tensors["guidance_scale"])
            return told
        if not self.guided:
            unguided: Tensor = self.unet(seen, timestep, prompt)
            return unguided
        embeds = torch.cat([tensors["negative"], prompt])
        both = self.unet(torch.cat([seen, seen]), torch.cat([timestep, timestep]), embeds)
        without, conditional = both.unflatten(0, (2, -1)).unbind(0)  # a slice at the batch would be host arithmetic
        guided: Tensor = without + per_request(tensors["guidance_scale"]) * (conditional - without)
        return guided * per_request(rescaling(guided, conditional, tensors["guidance_rescale"]))


def rescaling(guided: Tensor, conditional: Tensor, share: Tensor) -> Tensor:
    """The factor [B] that takes guided outputs [B, C, h, w] that share [B] of the way to the standard deviation of the
    conditional ones; exactly 1 where the share is 0 (Lin et al. 2023, section 3.4).
    """
    both = torch.stack([conditional, guided], dim=1).flatten(2)
    spread, own = (both - both.mean(dim=2, keepdim=True)).norm(dim=2).unbind(1)
    return torch.where(share > 0, 1 + share * (spread / own - 1), torch.ones_like(share))


def per_request(values: Tensor) -> Tensor:
    """[B] -> [B, 1, 1, 1]."""
    return values[:, None, None, None]


def own_size(pipeline: Any) -> Size:
    """Height and width of the latents that the model was made for."""
    side = pipeline.unet.config.sample_size
    return side, side


def pipeline_example(pipeline: Any, size: Size, concepts: int = 1) -> dict[str, Tensor]:
    """Example inputs of every engine of `pipeline`, for latents of height and width `size`."""
    config, tokens = pipeline.unet.config, pipeline.tokenizer.model_max_length
    latent = torch.randn(EXAMPLE_BATCH, config.in_channels, *size)
    example = step_example(latent, torch.randn(EXAMPLE_BATCH, tokens, config.cross_attention_dim), concepts)
    ids = torch.ones(EXAMPLE_BATCH, tokens, dtype=torch.int32)
    return example | {"input_ids": ids, "prompt_embeds": example["prompt"]}


def model_graphs(pipeline: Any, size: Size | None = None) -> dict[str, Graph]:
    """The engines of a Stable Diffusion pipeline that no safety has a part in, and the UNet that steps call.

    They are for latents of height and width `size`, the model's own by default; of another one, without the text encoder.
    """
    own = own_size(pipeline)
    size = size or own
    example, unet = pipeline_example(pipeline, size), sized("unet", size, own)
    encoder = {"text_encoder": graph(TextEncoderGraph(pipeline.text_encoder), example, engine_outputs("text_encoder"))}
    graphs = {
        "unet": graph(unet_graph(pipeline.unet, unet), example, ("model_output",)),
        "vae_decoder": graph(VaeDecoderGraph(pipeline.vae), example, engine_outputs("vae_decoder")),
        "plain_step": step_graph(PlainStepGraph(pipeline.unet, guided=True, part=unet), example),
        "plain_step_unguided": step_graph(PlainStepGraph(pipeline.unet, guided=False, part=unet), example),
    }
    return (encoder if size == own else {}) | {sized(name, size, own): made for name, made in graphs.items()}
