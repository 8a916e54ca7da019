"""The engines of the safety: what depends on the prompt alone, what is left to do in every step, and both as one. All fp32."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from saferedir.export.engine_graph import PART_OUTPUTS, STATE_OUTPUTS, VERDICT_OUTPUTS, Graph, graph
from saferedir_torch.controller import Controller, Policy, State
from saferedir_torch.safety_module import PromptPart, SafetyModule


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
        history: Tensor,
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
            history,
        )
        return (*state, *verdict)

    def output_shapes(self, *inputs: Tensor) -> list[tuple[torch.dtype, Any]]:
        _, _, _, prompt, _, _, _, cooldown, _, active, ok, enabled, *_ = inputs
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
        history: Tensor,
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
            latent, timestep, history, prompt, original, *self.part(original), cooldown, period, active, ok, enabled, threshold,
            alpha_scale,
        )  # fmt: skip
        return results

    def output_shapes(self, *inputs: Tensor) -> list[tuple[torch.dtype, Any]]:
        _, _, _, prompt, _, cooldown, _, active, ok, enabled, *_ = inputs
        return safety_shapes(prompt, cooldown, active, ok, enabled)


def safety_shapes(
    prompt: Tensor, cooldown: Tensor, active: Tensor, ok: Tensor, enabled: Tensor
) -> list[tuple[torch.dtype, Any]]:
    """Types and shapes of what the safety gives: the state, score, fired and masks."""
    masks = (*enabled.shape, prompt.shape[1])
    state = [(tensor.dtype, tensor.shape) for tensor in (prompt, cooldown, active, ok)]
    return [*state, (torch.float32, enabled.shape), (torch.bool, enabled.shape), (torch.float32, masks)]


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
