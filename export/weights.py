"""Weights out of the graphs: the model's own safetensors files, which every graph points into.

ONNX keeps large tensors as a file, an offset and a length, and a safetensors file holds tensors as plain bytes behind a
header. So one file serves both: several graphs share it, and any safetensors reader opens it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from safetensors.torch import save
from torch import nn

from saferedir.engines.whole_file import write_bytes

#: Smaller tensors stay inside the graph.
SMALLEST = 1024
FLOATS = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)


class Place(NamedTuple):
    """Where a tensor's bytes lie."""

    file: str
    offset: int
    length: int


class WeightFile:
    """A module's parameters as a safetensors file, as `save_pretrained` writes it for a model in fp16.

    Parameters in fp32 are stored in fp16 where that loses nothing; all others in their own type.
    """

    def __init__(self, name: str, module: nn.Module) -> None:
        self.name = name
        self._data = save({key: _stored(value) for key, value in module.state_dict().items()}, metadata={"format": "pt"})
        header_length = int.from_bytes(self._data[:8], "little")
        header: dict[str, Any] = json.loads(self._data[8 : 8 + header_length])
        self._places = {}
        for key, entry in header.items():
            if key != "__metadata__":
                start, end = (8 + header_length + offset for offset in entry["data_offsets"])
                self._places[_digest(self._data[start:end])] = Place(name, start, end - start)

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return len(self._data)

    @property
    def sha256(self) -> str:
        """Of the file's bytes."""
        return hashlib.sha256(self._data).hexdigest()

    def find(self, array: Any) -> Place | None:
        """Where `array` lies in the file, or None."""
        return self._places.get(_digest(np.ascontiguousarray(array).tobytes()))

    def write(self, folder: Path) -> None:
        write_bytes(folder / self.name, self._data)


def externalise(model: Any, files: Iterable[WeightFile]) -> list[str]:
    """Point large initialisers of `model` at the weights they came from, cast back and transposed where needed.

    The exporter transposes the weights of linear layers; a runtime folds casts and transposes once, at loading.
    Constants that are in no file stay in the graph, and what is outside already stays there. Returns the names of the files
    used.
    """
    files = list(files)
    restoring, initialisers = [], []
    for tensor in model.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            initialisers.append(tensor)
            continue
        array = numpy_helper.to_array(tensor)
        found = _find(array, files) if tensor.data_type in FLOATS and array.nbytes >= SMALLEST else None
        if found is None:
            initialisers.append(tensor)
            continue
        stored, transposed, place = found
        if stored.dtype == array.dtype and not transposed:
            initialisers.append(_external(tensor.name, stored, place))
            continue
        name = f"{tensor.name}.stored"
        initialisers.append(_external(name, stored, place))
        restoring += _restored(name, tensor.name, cast_to=tensor.data_type if stored.dtype != array.dtype else None,
                               transposed=transposed)  # fmt: skip
    del model.graph.initializer[:]
    model.graph.initializer.extend(initialisers)
    nodes = [*restoring, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    used = {entry.value for tensor in initialisers for entry in tensor.external_data if entry.key == "location"}
    return [file.name for file in files if file.name in used]


def _restored(stored: str, name: str, *, cast_to: int | None, transposed: bool) -> list[Any]:
    """Nodes that make the tensor `name` of what is stored: a cast, a transpose, or both."""
    nodes, given = [], stored
    if cast_to is not None:
        cast = f"{name}.cast" if transposed else name
        nodes.append(onnx.helper.make_node("Cast", [given], [cast], name=f"{stored}.cast", to=cast_to))
        given = cast
    if transposed:
        nodes.append(onnx.helper.make_node("Transpose", [given], [name], name=f"{stored}.transpose", perm=[1, 0]))
    return nodes


def _stored(tensor: torch.Tensor) -> torch.Tensor:
    own = tensor.detach().contiguous()
    if own.dtype != torch.float32:
        return own
    half = own.half()
    return half if torch.equal(half.float(), own) else own


def _find(array: Any, files: list[WeightFile]) -> tuple[Any, bool, Place] | None:
    """The array as it is stored, whether that is its transpose, and where."""
    stored = array
    if array.dtype == np.float32:
        half = array.astype(np.float16)
        stored = half if bool((half.astype(np.float32) == array).all()) else array
    for file in files:
        if (place := file.find(stored)) is not None:
            return stored, False, place
        if stored.ndim == 2 and (place := file.find(stored.T)) is not None:
            return stored.T, True, place
    return None


def _external(name: str, array: Any, place: Place) -> Any:
    tensor = onnx.TensorProto()
    tensor.name = name
    tensor.data_type = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
    tensor.dims.extend(array.shape)
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in {"location": place.file, "offset": str(place.offset), "length": str(place.length)}.items():
        tensor.external_data.add(key=key, value=value)
    return tensor


def _digest(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()
