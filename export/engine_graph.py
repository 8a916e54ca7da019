"""An engine about to be exported: a module, example inputs to trace it with, and the names of what it gives."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

#: Example batch for tracing; the exporter would specialise a dimension of 1.
EXAMPLE_BATCH = 2
DRAWN_OUTPUTS = ("next_latent", "model_output")
STATE_OUTPUTS = ("next_prompt", "next_cooldown", "next_active", "next_ok")
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
