"""Weights out of the graphs: stored once in fp16, beside the graphs, in a file that several graphs may share."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

#: Smaller tensors stay inside the graph.
SMALLEST = 1024
ALIGNMENT = 64


class WeightFile:
    """An external data file. Equal tensors are stored once, whichever graph they come from."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._chunks: list[bytes] = []
        self._size = 0
        self._offsets: dict[str, int] = {}

    def add(self, array: Any) -> tuple[int, int]:
        """Offset and length of `array` in the file."""
        data = np.ascontiguousarray(array).tobytes()
        key = hashlib.sha256(str(array.dtype).encode() + data).hexdigest()
        if key not in self._offsets:
            padding = -self._size % ALIGNMENT
            self._chunks += [bytes(padding), data]
            self._offsets[key] = self._size + padding
            self._size += padding + len(data)
        return self._offsets[key], len(data)

    def write(self, folder: Path) -> None:
        partial = folder / f"{self.name}.partial"
        with partial.open("wb") as file:
            file.writelines(self._chunks)
        os.replace(partial, folder / self.name)


def externalise(model: Any, choose: dict[str, WeightFile], default: WeightFile) -> list[str]:
    """Move large fp32 initialisers of `model` to weight files, as fp16 where that loses nothing, and cast them back.

    `choose` maps a prefix of the initialiser's name to its file. Returns the names of the files used.
    """
    used: dict[str, None] = {}
    casts, initialisers = [], []
    for tensor in model.graph.initializer:
        array = numpy_helper.to_array(tensor)
        if array.dtype != np.float32 or array.nbytes < SMALLEST:
            initialisers.append(tensor)
            continue
        file = next((chosen for prefix, chosen in choose.items() if tensor.name.startswith(prefix)), default)
        half = array.astype(np.float16)
        exact = bool((half.astype(np.float32) == array).all())
        stored = half if exact else array
        name = f"{tensor.name}.fp16" if exact else tensor.name
        initialisers.append(_external(name, stored, file))
        used[file.name] = None
        if exact:
            casts.append(
                onnx.helper.make_node("Cast", [name], [tensor.name], name=f"{tensor.name}.cast", to=onnx.TensorProto.FLOAT)
            )
    del model.graph.initializer[:]
    model.graph.initializer.extend(initialisers)
    nodes = [*casts, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return list(used)


def _external(name: str, array: Any, file: WeightFile) -> Any:
    offset, length = file.add(array)
    tensor = onnx.TensorProto()
    tensor.name = name
    tensor.data_type = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
    tensor.dims.extend(array.shape)
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in {"location": file.name, "offset": str(offset), "length": str(length)}.items():
        tensor.external_data.add(key=key, value=value)
    return tensor
