"""An engine about to be exported: a module, example inputs to trace it with, and the names of what it takes and gives."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from saferedir.engines.step import NUMBERS, STEP, Form, Role, step_inputs, step_outputs

#: Example batch for tracing; the exporter would specialise a dimension of 1.
EXAMPLE_BATCH = 2


@dataclass(frozen=True)
class Graph:
    """An engine about to be exported."""

    module: nn.Module
    #: Example inputs by name, in the order of the module's arguments; the first dimension of each is the batch.
    inputs: dict[str, Tensor]
    outputs: tuple[str, ...]
    #: Input -> dimension -> name of further dimensions that vary.
    dynamic: Mapping[str, Mapping[int, str]] = field(default_factory=dict)


def graph(
    module: nn.Module,
    example: Mapping[str, Tensor],
    outputs: Sequence[str],
    dynamic: Mapping[str, Mapping[int, str]] | None = None,
) -> Graph:
    """The graph of `module` with those tensors of `example` that it takes by name, in its order."""
    names = inspect.signature(module.forward).parameters
    return Graph(module, {name: example[name] for name in names}, tuple(outputs), dynamic or {})


class StepModule(nn.Module):
    """A step of one form: takes and gives its tensors in the declared order, and computes by their names.

    What a step is to compute with gets the columns of its `numbers` too, each [B, 1, 1, 1], by their names.
    """

    def __init__(self, form: Form) -> None:
        super().__init__()
        self.form = form

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        taken = dict(zip(step_inputs(self.form), tensors, strict=True))
        if (numbers := taken.get("numbers")) is not None:
            columns = torch.split(numbers[:, :, None, None], 1, dim=1)  # one kernel for all
            taken |= dict(zip(NUMBERS, columns, strict=True))
        given = self.compute(taken)
        return tuple(given[name] for name in step_outputs(self.form))

    def compute(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """What the step takes -> what it gives, both by name."""
        raise NotImplementedError


def step_graph(
    module: StepModule, example: Mapping[str, Tensor], dynamic: Mapping[str, Mapping[int, str]] | None = None
) -> Graph:
    """The graph of a step, with the tensors of its form."""
    inputs = {name: example[name] for name in step_inputs(module.form)}
    return Graph(module, inputs, step_outputs(module.form), dynamic or {})


def step_example(latent: Tensor, embeds: Tensor, concepts: int) -> dict[str, Tensor]:
    """Example inputs of a step of `concepts` concepts, from latent [B, C, h, w] and prompt embedding [B, T, D]."""
    sizes = dict(zip(("batch", "channels", "height", "width"), latent.shape, strict=True))
    sizes |= {"tokens": embeds.shape[1], "prompt width": embeds.shape[2], "concepts": concepts}
    example = {"latent": latent}
    for tensor in (tensor for tensor in STEP if tensor.role is not Role.RECORD):
        shape = [size if isinstance(size, int) else sizes[size] for size in tensor.shape]
        if tensor.example is not None:
            example[tensor.name] = torch.full(shape, tensor.example, dtype=getattr(torch, tensor.dtype))
        elif tensor.name not in example:
            example[tensor.name] = embeds.clone()
    return example
