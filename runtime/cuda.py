"""One stream of CUDA's driver, whose library comes with every driver: what ONNX Runtime's Python does not offer itself."""

from __future__ import annotations

import ctypes
from typing import Any

from saferedir.engines.errors import BackendError

LIBRARY = "libcuda.so.1"
#: Work on it does not wait for the default stream.
NON_BLOCKING = 1


def device_count() -> int:
    """How many devices the driver offers; 0 where there is no driver."""
    try:
        driver = ctypes.CDLL(LIBRARY)
    except OSError:
        return 0
    count = ctypes.c_int()
    return 0 if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)) else count.value


class CudaStream:
    """A stream on the first device, in its primary context, which all CUDA libraries of a process share.

    Raises:
        BackendError: there is no driver, no device, or a call fails.
    """

    def __init__(self, user: str) -> None:
        """`user` is who needs it, for the error message."""
        try:
            self._driver: Any = ctypes.CDLL(LIBRARY)
        except OSError as error:
            raise BackendError(f"{user} needs an NVIDIA GPU and its driver: {LIBRARY} is not there") from error
        device, stream = ctypes.c_int(), ctypes.c_void_p()
        self._context = ctypes.c_void_p()
        self._check("cuInit", 0)
        self._check("cuDeviceGet", ctypes.byref(device), 0)
        self._check("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), device)
        self._check("cuCtxSetCurrent", self._context)
        self._check("cuStreamCreate", ctypes.byref(stream), NON_BLOCKING)
        self._stream = stream

    @property
    def pointer(self) -> int:
        """The stream's handle, as ONNX Runtime takes it."""
        return int(self._stream.value or 0)

    def copy(self, target: int, source: int, size: int) -> None:
        """Copy `size` bytes between addresses on the device, in the stream's order; does not wait."""
        self._check("cuCtxSetCurrent", self._context)
        pointers = ctypes.c_uint64(target), ctypes.c_uint64(source), ctypes.c_size_t(size)
        self._check("cuMemcpyDtoDAsync_v2", *pointers, self._stream)

    def upload(self, target: int, source: int, size: int) -> None:
        """Copy `size` bytes of the host's to the device, in the stream's order; the host's may change afterwards."""
        self._check("cuCtxSetCurrent", self._context)
        pointers = ctypes.c_uint64(target), ctypes.c_void_p(source), ctypes.c_size_t(size)
        self._check("cuMemcpyHtoDAsync_v2", *pointers, self._stream)

    def download(self, target: int, source: int, size: int) -> None:
        """Copy `size` bytes of the device's to the host, in the stream's order; does not wait."""
        self._check("cuCtxSetCurrent", self._context)
        pointers = ctypes.c_void_p(target), ctypes.c_uint64(source), ctypes.c_size_t(size)
        self._check("cuMemcpyDtoHAsync_v2", *pointers, self._stream)

    def synchronize(self) -> None:
        """Wait for all that was enqueued."""
        self._check("cuCtxSetCurrent", self._context)
        self._check("cuStreamSynchronize", self._stream)

    def _check(self, function: str, *arguments: Any) -> None:
        code = getattr(self._driver, function)(*arguments)
        if code:
            text = ctypes.c_char_p()
            self._driver.cuGetErrorString(code, ctypes.byref(text))
            said = text.value.decode() if text.value else "unknown error"
            raise BackendError(f"CUDA's {function} failed with error {code}: {said}")
