"""The safety of a step as a graph, which steps call. All fp32."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from saferedir.export.engine_graph import STATE_OUTPUTS, VERDICT_OUTPUTS, Graph, graph
from saferedir_torch.controller import Controller, Policy, State
from saferedir_torch.safety_module import SafetyModule


class SafetyGraph(nn.Module):
    """The controller: what the UNet is about to see, and the request's state, in and out."""

    def __init__(self, module: SafetyModule, part: str = "safety") -> None:
        super().__init__()
        self.controller = Controller(module)
        self.part = part

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
        state, verdict = self.controller(
            latent, timestep, original, State(prompt, cooldown, active, ok), Policy(period, enabled, threshold, alpha_scale),
            history,
        )  # fmt: skip
        return (*state, *verdict)

    def output_shapes(self, *inputs: Tensor) -> list[tuple[torch.dtype, Any]]:
        _, _, _, prompt, _, cooldown, _, active, ok, enabled, *_ = inputs
        masks = (*enabled.shape, prompt.shape[1])
        state = [(tensor.dtype, tensor.shape) for tensor in (prompt, cooldown, active, ok)]
        return [*state, (torch.float32, enabled.shape), (torch.bool, enabled.shape), (torch.float32, masks)]


def safety_graph(module: SafetyModule, example: dict[str, Tensor], part: str = "safety") -> Graph:
    """The safety alone; `example` is that of a step."""
    return graph(SafetyGraph(module, part), example, (*STATE_OUTPUTS, *VERDICT_OUTPUTS))
