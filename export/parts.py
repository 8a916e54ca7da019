"""Parts of engines: a step calls the UNet and the safety, which are traced once and written into every graph with a call.

Tracing is what an export spends its time on, and one trace in all graphs makes them compute the same to the bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

#: Of the operator that stands for a part until it is written in.
DOMAIN = "saferedir.part"


@runtime_checkable
class CalledPart(Protocol):
    """A module that is traced by itself and written into the engines that call it."""

    #: Its name, which its nodes begin with where they are written in.
    part: str

    def output_shapes(self, *inputs: Tensor) -> list[tuple[torch.dtype, Any]]:
        """Type and shape of every output, from the inputs."""
        ...


class _Call(nn.Module):
    """Stands for a part while a graph around it is traced."""

    def __init__(self, called: CalledPart) -> None:
        super().__init__()
        self._called = (called,)  # in a tuple, so that its parameters are no part of this module

    def forward(self, *inputs: Tensor) -> Any:
        called = self._called[0]
        types, shapes = zip(*called.output_shapes(*inputs), strict=True)
        outputs = torch.onnx.ops.symbolic_multi_out(f"{DOMAIN}::{called.part}", inputs, dtypes=types, shapes=shapes, version=1)
        return outputs[0] if len(outputs) == 1 else tuple(outputs)


@contextmanager
def calls_for_parts(module: nn.Module) -> Iterator[None]:
    """Within, parts of `module` are calls."""
    replaced = [
        (parent, name, child)
        for parent in module.modules()
        for name, child in parent.named_children()
        if isinstance(child, CalledPart)
    ]
    try:
        for parent, name, child in replaced:
            setattr(parent, name, _Call(child))
        yield
    finally:
        for parent, name, child in replaced:
            setattr(parent, name, child)


def called_parts(module: nn.Module) -> set[str]:
    """Names of the parts that `module` calls."""
    return {child.part for part in module.modules() for child in part.children() if isinstance(child, CalledPart)}


def write_in(model: Any, parts: Mapping[str, Any]) -> None:
    """Replace the calls in the ONNX `model` by the nodes of `parts`, whose names get the part's as a prefix."""
    nodes = []
    for node in model.graph.node:
        if node.domain != DOMAIN:
            nodes.append(node)
            continue
        called = parts[node.op_type]
        names = dict(zip((value.name for value in called.graph.input), node.input, strict=True))
        names |= dict(zip((value.name for value in called.graph.output), node.output, strict=True))
        for tensor in called.graph.initializer:
            own = model.graph.initializer.add()
            own.CopyFrom(tensor)
            own.name = names.setdefault(tensor.name, f"{node.op_type}/{tensor.name}")
        for inner in called.graph.node:
            written = deepcopy(inner)
            written.name = f"{node.op_type}/{inner.name}"
            written.input[:] = [name and names[name] for name in inner.input]
            written.output[:] = [name and names.setdefault(name, f"{node.op_type}/{name}") for name in inner.output]
            nodes.append(written)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    kept = [own for own in model.opset_import if own.domain != DOMAIN]
    del model.opset_import[:]
    model.opset_import.extend(kept)
