"""Half precision: the model computes in fp16 or bf16, with islands that stay in fp32."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

#: What a bundle may compute in, by the name on the command line.
PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
#: Modules that stay in fp32; `benchmarks.precision` shows what each buys.
ISLANDS = (nn.GroupNorm, nn.LayerNorm)
PARTS = ("text_encoder", "unet", "vae")


def halved(pipeline: Any, dtype: torch.dtype, islands: tuple[type[nn.Module], ...] = ISLANDS) -> Any:
    """A pipeline whose models are copies in `dtype`; modules of the types `islands` take and give it, and compute in fp32."""
    parts = {name: halved_model(getattr(pipeline, name), dtype, islands) for name in PARTS}
    return type(pipeline)(**{**pipeline.components, **parts}, requires_safety_checker=False)


def halved_model(model: Any, dtype: torch.dtype, islands: tuple[type[nn.Module], ...] = ISLANDS) -> Any:
    """A copy of one model in `dtype`, with such islands."""
    model = deepcopy(model)
    kept = [(module, deepcopy(module.state_dict())) for module in model.modules() if isinstance(module, islands)]
    model.to(dtype)
    for module, weights in kept:
        module.float().load_state_dict(weights)  # as they were before they were rounded
        module.register_forward_pre_hook(_to_float)
        module.register_forward_hook(_back_to(dtype))
    return model


def _to_float(_: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(tensor.float() for tensor in arguments)


def _back_to(dtype: torch.dtype) -> Any:
    return lambda _, __, output: output.to(dtype)
