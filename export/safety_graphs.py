"""The safety of a step as a graph, which steps call. All fp32."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from saferedir.engines.step import Form, Role, step_tensors
from saferedir.export.engine_graph import StepModule
from saferedir_torch.controller import Controller, Guided, Policy, Seen, State, Verdict
from saferedir_torch.safety_module import SafetyModule


class SafetyGraph(StepModule):
    """The controller: what the UNet is about to see, and the request's state, in and out."""

    def __init__(self, module: SafetyModule, part: str = "safety") -> None:
        super().__init__(Form.SAFETY)
        self.controller = Controller(module)
        self.part = part

    def compute(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        state, verdict = self.controller(
            Seen(tensors["latent"], tensors["noise_share"].flatten(), tensors["denoised"], tensors["known"].flatten() > 0.5),
            tensors["original"],
            Guided(tensors["negative"], tensors["amplification"].flatten()),
            State(*(tensors[name] for name in State._fields)),
            Policy(*(tensors[name] for name in Policy._fields)),
        )
        return named(state, verdict)

    def output_shapes(self, *inputs: Tensor) -> list[tuple[torch.dtype, Any]]:
        declared = step_tensors(self.form)
        sizes: dict[int | str, Any] = {}
        for tensor, given in zip((own for own in declared if own.role is not Role.RECORD), inputs, strict=True):
            sizes |= dict(zip(tensor.shape, given.shape, strict=True))
        return [
            (getattr(torch, tensor.dtype), tuple(sizes[size] for size in tensor.shape))
            for tensor in declared
            if tensor.role in (Role.STATE, Role.RECORD)
        ]


def named(state: Any, verdict: Verdict) -> dict[str, Tensor]:
    """What a controller gives, by the names of a step's outputs."""
    return {f"next_{name}": tensor for name, tensor in state._asdict().items()} | verdict._asdict()
