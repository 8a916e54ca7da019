"""What the denoising loop asks of an execution backend; all backends share the one loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
#: A tensor where the backend computes; opaque to the loop.
DeviceTensor = Any
#: By the name that an engine has for each.
Tensors = Mapping[str, DeviceTensor]
#: Runs an engine on tensors that were bound before.
Call = Callable[[], None]


class Backend(Protocol):
    """Engines of one bundle on one device. Safe for several threads: state lives in the tensors, never here."""

    #: The name it was asked for by, such as `ort-cpu`.
    name: str
    #: Whether steps on resident rows are captured, so that each number of rows costs seconds and memory when it is met first.
    captures: bool

    def upload(self, array: Array) -> DeviceTensor:
        """A copy of `array` on the device."""
        ...

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> DeviceTensor:
        """An uninitialised tensor on the device."""
        ...

    def bind(self, engine: str, inputs: Tensors, outputs: Tensors, rows: int | None = None) -> Call:
        """A call of `engine` on those of these tensors that it takes and gives, by name.

        With `rows` it is of the first `rows` of tensors that stay where they are, to be called again and again. Binding is done
        once; calling allocates nothing.

        Raises:
            BackendError: the engine cannot be loaded on this device.
        """
        ...

    def write(self, tensor: DeviceTensor, row: int, values: Array) -> None:
        """Rows `row` to `row + len(values)` of `tensor` become `values`, of its type."""
        ...

    def move(self, tensor: DeviceTensor, target: int, source: int) -> None:
        """Row `target` of `tensor` becomes what its row `source` is."""
        ...

    def read(self, tensor: DeviceTensor, row: int = 0, rows: int | None = None) -> Array:
        """Rows `row` to `row + rows` of `tensor` on the host, all by default; waits for the device."""
        ...

    def versions(self) -> dict[str, str]:
        """Versions and the provider in use, for the safety record."""
        ...


class BackendAround:
    """Another backend, of which some part is done differently."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.name, self.captures = backend.name, backend.captures

    def upload(self, array: Array) -> DeviceTensor:
        return self.backend.upload(array)

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> DeviceTensor:
        return self.backend.empty(shape, dtype)

    def bind(self, engine: str, inputs: Tensors, outputs: Tensors, rows: int | None = None) -> Call:
        return self.backend.bind(engine, inputs, outputs, rows)

    def write(self, tensor: DeviceTensor, row: int, values: Array) -> None:
        self.backend.write(tensor, row, values)

    def move(self, tensor: DeviceTensor, target: int, source: int) -> None:
        self.backend.move(tensor, target, source)

    def read(self, tensor: DeviceTensor, row: int = 0, rows: int | None = None) -> Array:
        return self.backend.read(tensor, row, rows)

    def versions(self) -> dict[str, str]:
        return self.backend.versions()
