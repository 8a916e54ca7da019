"""What the denoising loop asks of an execution backend; all backends share the one loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
#: A tensor where the backend computes; opaque to the loop.
DeviceTensor = Any
#: Runs an engine on tensors that were bound before.
Call = Callable[[], None]


class Backend(Protocol):
    """Engines of one bundle on one device. Safe for several threads: state lives in the tensors, never here."""

    #: The name it was asked for by, such as `ort-cpu`.
    name: str

    def upload(self, array: Array) -> DeviceTensor:
        """A copy of `array` on the device."""
        ...

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> DeviceTensor:
        """An uninitialised tensor on the device."""
        ...

    def download(self, tensor: DeviceTensor) -> Array:
        """The tensor on the host; waits for the device."""
        ...

    def bind(self, engine: str, inputs: Mapping[str, DeviceTensor], outputs: Mapping[str, DeviceTensor]) -> Call:
        """A call of `engine` on those of these tensors that it takes and gives, by name.

        Binding is done once, before the loop; calling allocates nothing.

        Raises:
            BackendError: the engine cannot be loaded on this device.
        """
        ...

    def versions(self) -> dict[str, str]:
        """Versions and the provider in use, for the safety record."""
        ...


class BackendAround:
    """Another backend, of which some part is done differently."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.name = backend.name

    def upload(self, array: Array) -> DeviceTensor:
        return self.backend.upload(array)

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> DeviceTensor:
        return self.backend.empty(shape, dtype)

    def download(self, tensor: DeviceTensor) -> Array:
        return self.backend.download(tensor)

    def bind(self, engine: str, inputs: Mapping[str, DeviceTensor], outputs: Mapping[str, DeviceTensor]) -> Call:
        return self.backend.bind(engine, inputs, outputs)

    def versions(self) -> dict[str, str]:
        return self.backend.versions()
