"""One wrapper module an engine: names the tensors and changes nothing in the model.

A model in half precision is given its own type; the tensors of every engine are fp32, and so are guidance, sampler and safety.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from saferedir.engines.manifest import sized
from saferedir_torch.controller import Controller, Policy, State
from saferedir_torch.safety_module import PromptPart, SafetyModule

#: Example batch for tracing; the exporter would specialise a dimension of 1.
EXAMPLE_BATCH = 2


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

    def __init__(self, unet: Any, engine: str = "unet") -> None:
        super().__init__()
        self.unet = unet
        self.engine = engine

    def forward(self, latent: Tensor, timestep: Tensor, prompt_embeds: Tensor) -> Tensor:
        dtype = self.unet.dtype
        output: Tensor = self.unet(latent.to(dtype), timestep, prompt_embeds.to(dtype), return_dict=False)[0]
        return output.float()

    def output_shapes(self, latent: Tensor, *_: Tensor) -> list[tuple[torch.dtype, Any]]:
        return [(torch.float32, latent.shape)]


class GuidedUNetGraph(nn.Module):
    """Of a latent consistency model, which is told the guidance scale [B] and called once."""

    def __init__(self, unet: Any, engine: str = "unet") -> None:
        super().__init__()
        self.unet = unet
        self.engine = engine

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


def unet_graph(unet: Any, engine: str = "unet") -> UNetGraph | GuidedUNetGraph:
    """The engine of a UNet, of whichever kind it is."""
    return GuidedUNetGraph(unet, engine) if unet.config.get("time_cond_proj_dim") else UNetGraph(unet, engine)


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


class SafetyPromptGraph(nn.Module):
    """What the safety makes of the original embedding alone, once per prompt: original [B, T, D] -> its parts."""

    engine = "safety_prompt"

    def __init__(self, module: SafetyModule) -> None:
        super().__init__()
        self.module = module
        with torch.no_grad():
            parts = module.prompt_part(torch.zeros(1, module.config.prompt_tokens, module.config.prompt_width))
        self.shapes = [tuple(part.shape[1:]) for part in parts]

    def forward(self, original: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.module.prompt_part(original))

    def output_shapes(self, original: Tensor) -> list[tuple[torch.dtype, Any]]:
        return [(torch.float32, (original.shape[0], *shape)) for shape in self.shapes]


class SafetyStepGraph(nn.Module):
    """The safety engine with what `SafetyPromptGraph` made of the prompt: what is left to do in every step."""

    def __init__(self, module: SafetyModule, engine: str = "safety_step") -> None:
        super().__init__()
        self.controller = Controller(module)
        self.engine = engine

    def forward(
        self,
        latent: Tensor,
        timestep: Tensor,
        prompt: Tensor,
        original: Tensor,
        prompt_features: Tensor,
        word_logits: Tensor,
        cooldown: Tensor,
        period: Tensor,
        active: Tensor,
        ok: Tensor,
        enabled: Tensor,
        threshold: Tensor,
        alpha_scale: Tensor,
    ) -> tuple[Tensor, ...]:
        state, verdict = self.controller(
            latent,
            timestep,
            original,
            State(prompt, cooldown, active, ok),
            Policy(period, enabled, threshold, alpha_scale),
            PromptPart(prompt_features, word_logits),
        )
        return (*state, *verdict)

    def output_shapes(self, *inputs: Tensor) -> list[tuple[torch.dtype, Any]]:
        _, _, prompt, _, _, _, cooldown, _, active, ok, enabled, *_ = inputs
        return safety_shapes(prompt, cooldown, active, ok, enabled)


class SafetyGraph(nn.Module):
    """The safety engine alone: what the UNet is about to see, and the request's state, in and out."""

    def __init__(self, module: SafetyModule, engine: str = "safety", step: str = "safety_step") -> None:
        super().__init__()
        self.part, self.step = SafetyPromptGraph(module), SafetyStepGraph(module, step)
        self.engine = engine

    def forward(
        self,
        latent: Tensor,
        timestep: Tensor,
        prompt: Tensor,
        original: Tensor,
        cooldown: Tensor,
        period: Tensor,
        active: Tensor,
        ok: Tensor,
        enabled: Tensor,
        threshold: Tensor,
        alpha_scale: Tensor,
    ) -> tuple[Tensor, ...]:
        results: tuple[Tensor, ...] = self.step(
            latent, timestep, prompt, original, *self.part(original), cooldown, period, active, ok, enabled, threshold,
            alpha_scale,
        )  # fmt: skip
        return results

    def output_shapes(self, *inputs: Tensor) -> list[tuple[torch.dtype, Any]]:
        _, _, prompt, _, cooldown, _, active, ok, enabled, *_ = inputs
        return safety_shapes(prompt, cooldown, active, ok, enabled)


def safety_shapes(
    prompt: Tensor, cooldown: Tensor, active: Tensor, ok: Tensor, enabled: Tensor
) -> list[tuple[torch.dtype, Any]]:
    """Types and shapes of what the safety gives: the state, score, fired and masks."""
    masks = (*enabled.shape, prompt.shape[1])
    state = [(tensor.dtype, tensor.shape) for tensor in (prompt, cooldown, active, ok)]
    return [*state, (torch.float32, enabled.shape), (torch.bool, enabled.shape), (torch.float32, masks)]


class StepGraph(nn.Module):
    """A whole denoising step: safety, UNet, guidance, scheduler update, every quantity per request.

    `coefficients` [B, 4] are the factors of latent, model output, history and noise.
    """

    def __init__(self, safety: SafetyGraph, denoiser: PlainStepGraph) -> None:
        super().__init__()
        self.safety = safety
        self.denoiser = denoiser

    def forward(
        self,
        latent: Tensor,
        timestep: Tensor,
        input_scale: Tensor,
        coefficients: Tensor,
        history: Tensor,
        noise: Tensor,
        negative: Tensor,
        guidance_scale: Tensor,
        prompt: Tensor,
        original: Tensor,
        cooldown: Tensor,
        period: Tensor,
        active: Tensor,
        ok: Tensor,
        enabled: Tensor,
        threshold: Tensor,
        alpha_scale: Tensor,
    ) -> tuple[Tensor, ...]:
        seen = latent * per_request(input_scale)
        next_prompt, next_cooldown, next_active, safe, *verdict = self.safety(
            seen, timestep, prompt, original, cooldown, period, active, ok, enabled, threshold, alpha_scale
        )
        moved, model_output = self.denoiser(
            latent, timestep, input_scale, coefficients, history, noise, negative, guidance_scale, next_prompt
        )
        next_ok = safe & torch.isfinite(moved).flatten(1).all(dim=1)
        return (moved, model_output, next_prompt, next_cooldown, next_active, next_ok, *verdict)


class PlainStepGraph(nn.Module):
    """The same step without safety, for an operator who switched it off, and to prove what safety leaves untouched."""

    def __init__(self, unet: Any, *, guided: bool, engine: str = "unet") -> None:
        super().__init__()
        self.unet = unet_graph(unet, engine)
        self.guided = guided
        self.told = isinstance(self.unet, GuidedUNetGraph)

    def forward(
        self,
        latent: Tensor,
        timestep: Tensor,
        input_scale: Tensor,
        coefficients: Tensor,
        history: Tensor,
        noise: Tensor,
        negative: Tensor,
        guidance_scale: Tensor,
        prompt: Tensor,
    ) -> tuple[Tensor, Tensor]:
        seen = latent * per_request(input_scale)
        if self.told:
            model_output = self.unet(seen, timestep, prompt, guidance_scale)
        elif self.guided:
            both = self.unet(torch.cat([seen, seen]), torch.cat([timestep, timestep]), torch.cat([negative, prompt]))
            without, conditional = both.unflatten(0, (2, -1)).unbind(0)  # a slice at the batch would be host arithmetic
            model_output = without + per_request(guidance_scale) * (conditional - without)
        else:
            model_output = self.unet(seen, timestep, prompt)
        factors = [per_request(factor) for factor in coefficients.unbind(1)]
        moved = factors[0] * latent + factors[1] * model_output
        return moved + factors[2] * history + factors[3] * noise, model_output


def per_request(values: Tensor) -> Tensor:
    """[B] -> [B, 1, 1, 1]."""
    return values[:, None, None, None]


DRAWN_OUTPUTS = ("next_latent", "model_output")
STATE_OUTPUTS = ("next_prompt", "next_cooldown", "next_active", "next_ok")
PART_OUTPUTS = ("prompt_features", "word_logits")
VERDICT_OUTPUTS = ("score", "fired", "token_mask")


@dataclass(frozen=True)
class Graph:
    """An engine about to be exported."""

    module: nn.Module
    #: Example inputs by name; the first dimension of each is the batch.
    inputs: dict[str, Tensor]
    outputs: tuple[str, ...]
    #: Input -> dimension -> name of further dimensions that vary.
    dynamic: Mapping[str, Mapping[int, str]] = field(default_factory=dict)


def graph(
    module: nn.Module,
    example: Mapping[str, Tensor],
    outputs: tuple[str, ...],
    dynamic: Mapping[str, Mapping[int, str]] | None = None,
) -> Graph:
    """The graph of `module` with those tensors of `example` that it takes, in its order."""
    names = inspect.signature(module.forward).parameters
    return Graph(module, {name: example[name] for name in names}, outputs, dynamic or {})


def step_example(latent: Tensor, embeds: Tensor, concepts: int) -> dict[str, Tensor]:
    """Example inputs of a step of `concepts` concepts, from latent [B, C, h, w] and prompt embedding [B, T, D]."""
    batch = len(latent)
    return {
        "latent": latent,
        "timestep": torch.full((batch,), 500.0),
        "input_scale": torch.ones(batch),
        "coefficients": torch.ones(batch, 4),
        "history": torch.zeros_like(latent),
        "noise": torch.zeros_like(latent),
        "negative": embeds.clone(),
        "guidance_scale": torch.full((batch,), 5.0),
        "prompt": embeds,
        "original": embeds.clone(),
        "cooldown": torch.zeros(batch, dtype=torch.int32),
        "period": torch.full((batch,), 2, dtype=torch.int32),
        "active": torch.zeros(batch, concepts, dtype=torch.bool),
        "ok": torch.ones(batch, dtype=torch.bool),
        "enabled": torch.ones(batch, concepts, dtype=torch.bool),
        "threshold": torch.full((batch, concepts), 0.5),
        "alpha_scale": torch.full((batch, concepts), 1.5),
    }


Size = tuple[int, int]


def own_size(pipeline: Any) -> Size:
    """Height and width of the latents that the model was made for."""
    side = pipeline.unet.config.sample_size
    return side, side


def _example(pipeline: Any, size: Size, concepts: int = 1) -> dict[str, Tensor]:
    config, tokens = pipeline.unet.config, pipeline.tokenizer.model_max_length
    latent = torch.randn(EXAMPLE_BATCH, config.in_channels, *size)
    example = step_example(latent, torch.randn(EXAMPLE_BATCH, tokens, config.cross_attention_dim), concepts)
    ids = torch.ones(EXAMPLE_BATCH, tokens, dtype=torch.int32)
    return example | {"input_ids": ids, "prompt_embeds": example["prompt"]}


def model_graphs(pipeline: Any, size: Size | None = None) -> dict[str, Graph]:
    """The engines of a Stable Diffusion pipeline that no safety has a part in, with example inputs.

    They are for latents of height and width `size`, the model's own by default; of another one, without the text encoder.
    """
    own = own_size(pipeline)
    size = size or own
    example, unet = _example(pipeline, size), sized("unet", size, own)
    encoder = {"text_encoder": graph(TextEncoderGraph(pipeline.text_encoder), example, ("prompt_embeds",))}
    graphs = {
        "unet": graph(unet_graph(pipeline.unet, unet), example, ("model_output",)),
        "vae_decoder": graph(VaeDecoderGraph(pipeline.vae), example, ("image",)),
        "plain_step": graph(PlainStepGraph(pipeline.unet, guided=True, engine=unet), example, DRAWN_OUTPUTS),
        "plain_step_unguided": graph(PlainStepGraph(pipeline.unet, guided=False, engine=unet), example, DRAWN_OUTPUTS),
    }
    return (encoder if size == own else {}) | {sized(name, size, own): made for name, made in graphs.items()}


def safety_graphs(safety: SafetyModule, example: dict[str, Tensor], fused: str = "safety") -> dict[str, Graph]:
    """The engines of the safety alone; `example` is that of a step, `fused` what the engine that is both is called."""
    with torch.no_grad():
        parts = dict(zip(PART_OUTPUTS, safety.prompt_part(example["original"]), strict=True))
    outputs, step = (*STATE_OUTPUTS, *VERDICT_OUTPUTS), step_of(fused)
    return {
        "safety_prompt": graph(SafetyPromptGraph(safety), example, PART_OUTPUTS),
        step: graph(SafetyStepGraph(safety, step), example | parts, outputs),
        fused: graph(SafetyGraph(safety, fused, step), example, outputs),
    }


def step_of(fused: str) -> str:
    """The name of the engine that is a fused safety engine without what depends on the prompt alone."""
    return fused.replace("safety", "safety_step", 1)


def all_graphs(pipeline: Any, safety: SafetyModule, further_sizes: Sequence[Size] = ()) -> dict[str, Graph]:
    """Every engine of a Stable Diffusion pipeline protected by `safety`, with example inputs, for latents of the model's own
    size and of further ones."""
    own = own_size(pipeline)
    graphs: dict[str, Graph] = {}
    for size in (own, *further_sizes):
        example = _example(pipeline, size, len(safety.config.concepts))
        outputs = (*DRAWN_OUTPUTS, *STATE_OUTPUTS, *VERDICT_OUTPUTS)
        fused, unet = sized("safety", size, own), sized("unet", size, own)
        graphs |= model_graphs(pipeline, size) | safety_graphs(safety, example, fused)
        for name, guided in (("step", True), ("step_unguided", False)):
            called = SafetyGraph(safety, fused, step_of(fused)), PlainStepGraph(pipeline.unet, guided=guided, engine=unet)
            graphs[sized(name, size, own)] = graph(StepGraph(*called), example, outputs)
    return graphs
