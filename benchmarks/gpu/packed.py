"""A network's tensors in one buffer, which graphs point into, so that no graph holds weights or waits for them."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import onnx_ir
import torch
from onnx import helper
from torch import Tensor, nn

from saferedir.export.engine_graph import Graph
from saferedir.export.onnx_export import traced_program, written
from saferedir.export.weights import Place

#: Tensors of at most so many values stay inside a graph.
SMALLEST = 1024
#: The exporter folds constants of at most so many values, so these have to be there when a graph is traced.
FOLDED = 8192
#: Bytes; a tensor begins at a multiple.
ALIGNMENT = 64


class Slot(NamedTuple):
    """A tensor of a network: the module that has it, and its name there and in the whole."""

    owner: nn.Module
    name: str
    path: str
    tensor: Tensor


class Packed:
    """Moves all tensors of `network` into one buffer, in place. What was on the device `meta` gets room; of that, only what the
    exporter looks at is filled, until `fill` is called, so that tracing takes no memory for weights."""

    def __init__(self, file: str, network: nn.Module) -> None:
        self.file, self.network = file, network
        self._random: list[Tensor] = []
        found, end = list(_slots(network)), 0
        starts = []
        for slot in found:
            starts.append(end)
            end += -(-slot.tensor.nbytes // ALIGNMENT) * ALIGNMENT
        self.buffer = np.empty(end, np.uint8)
        for slot, start in zip(found, starts, strict=True):
            self._move(slot, start)

    def fill(self, device: torch.device) -> None:
        """Give random values to what has none yet, made on `device`."""
        torch.manual_seed(0)
        for tensor in self._random:
            _randomise(tensor, device)
        self._random.clear()

    def trace(self, name: str, graph: Graph) -> Any:
        """The part `name` as an ONNX model that points into the buffer, with the graph's module being this network."""
        program, transposed = traced_program(name, graph), set()
        for tensor_name, value in program.model.graph.initializers.items():
            constant = value.const_value
            found = self._place(constant.numpy()) if constant.size > SMALLEST else None
            if found is not None:
                place, turned = found
                shape = onnx_ir.Shape(constant.shape[::-1] if turned else constant.shape)
                value.const_value = onnx_ir.ExternalTensor(*place, dtype=constant.dtype, shape=shape, name=tensor_name)
                if turned:
                    transposed.add(tensor_name)
        model = written(program)
        _turn(model, transposed)
        return model

    def _place(self, array: npt.NDArray[Any]) -> tuple[Place, bool] | None:
        """Where a constant that the exporter left lies in the buffer, and whether it is transposed there; None: not there."""
        offset = array.__array_interface__["data"][0] - self.buffer.__array_interface__["data"][0]
        turned = not array.flags.c_contiguous
        if not 0 <= offset < self.buffer.nbytes or (turned and not array.T.flags.c_contiguous):
            return None
        return Place(self.file, offset, array.nbytes), turned

    def _move(self, slot: Slot, start: int) -> None:
        room = torch.from_numpy(self.buffer[start : start + slot.tensor.nbytes]).view(slot.tensor.dtype)
        shape = slot.tensor.shape
        # The exporter multiplies by a linear layer's weight transposed, so that is how it is stored.
        moved = room.view(shape[::-1]).t() if len(shape) == 2 else room.view(shape)
        if not slot.tensor.is_meta:
            moved.copy_(slot.tensor)
        elif moved.ndim == 1:
            moved.fill_(0.0 if slot.name == "bias" else 1.0)
        elif moved.numel() <= FOLDED:
            torch.manual_seed(zlib.crc32(slot.path.encode()))
            _randomise(moved, torch.device("cpu"))
        else:
            self._random.append(moved)
        if slot.name in slot.owner._parameters:
            slot.owner._parameters[slot.name] = nn.Parameter(moved, requires_grad=False)
        else:
            slot.owner._buffers[slot.name] = moved


def _randomise(tensor: Tensor, device: torch.device) -> None:
    """Fill a weight as layers are made by default, so that a deep network's values stay finite in fp16."""
    stored = tensor.t() if tensor.ndim == 2 else tensor  # as it lies in memory
    scale: float = (3 * tensor[0].numel()) ** -0.5
    stored.copy_(torch.randn(stored.shape, dtype=stored.dtype, device=device) * scale)


def _turn(model: Any, names: set[str]) -> None:
    """Transpose these initialisers of the ONNX `model`, which are stored the other way round."""
    nodes = []
    for tensor in model.graph.initializer:
        if tensor.name in names:
            stored = f"{tensor.name}.stored"
            nodes.append(helper.make_node("Transpose", [stored], [tensor.name], name=f"{stored}.transpose", perm=[1, 0]))
            tensor.name = stored
    nodes += model.graph.node
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def _slots(network: nn.Module) -> Iterator[Slot]:
    """What a state dictionary holds."""
    for prefix, module in network.named_modules():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and name not in module._non_persistent_buffers_set:
                yield Slot(module, name, f"{prefix}.{name}" if prefix else name, tensor)
