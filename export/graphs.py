"""Every engine of a protected model, the whole denoising step among them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from saferedir.engines.manifest import sized
from saferedir.export.engine_graph import DRAWN_OUTPUTS, STATE_OUTPUTS, VERDICT_OUTPUTS, Graph, graph
from saferedir.export.model_graphs import PlainStepGraph, Size, model_graphs, own_size, per_request, pipeline_example
from saferedir.export.safety_graphs import SafetyGraph, safety_graph
from saferedir_torch.safety_module import SafetyModule


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
            seen, timestep, history, prompt, original, cooldown, period, active, ok, enabled, threshold, alpha_scale
        )
        moved, model_output = self.denoiser(
            latent, timestep, input_scale, coefficients, history, noise, negative, guidance_scale, next_prompt
        )
        next_ok = safe & torch.isfinite(moved).flatten(1).all(dim=1)
        return (moved, model_output, next_prompt, next_cooldown, next_active, next_ok, *verdict)


def all_graphs(pipeline: Any, safety: SafetyModule, further_sizes: Sequence[Size] = ()) -> dict[str, Graph]:
    """Every engine of a Stable Diffusion pipeline protected by `safety`, and the parts that these call, with example inputs,
    for latents of the model's own size and of further ones."""
    own = own_size(pipeline)
    graphs: dict[str, Graph] = {}
    for size in (own, *further_sizes):
        example = pipeline_example(pipeline, size, len(safety.config.concepts))
        outputs = (*DRAWN_OUTPUTS, *STATE_OUTPUTS, *VERDICT_OUTPUTS)
        part, unet = sized("safety", size, own), sized("unet", size, own)
        graphs |= model_graphs(pipeline, size) | {part: safety_graph(safety, example, part)}
        for name, guided in (("step", True), ("step_unguided", False)):
            called = SafetyGraph(safety, part), PlainStepGraph(pipeline.unet, guided=guided, part=unet)
            graphs[sized(name, size, own)] = graph(StepGraph(*called), example, outputs)
    return graphs
