"""ONNX Runtime on CUDA: everything on one stream, steps captured in CUDA graphs; only a download waits for the device."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from saferedir.engines import Bundle
from saferedir.runtime.backend import Array, Call, DeviceTensor
from saferedir.runtime.cuda import CudaStream
from saferedir.runtime.ort import OrtBackend

#: What the loop calls again and again with tensors of the same shapes: one launch replays the whole step.
CAPTURED = frozenset(("step", "step_unguided", "plain_step", "plain_step_unguided"))
#: A graph's number that says: none.
NO_GRAPH = -1

Tensors = Mapping[str, DeviceTensor]
#: Addresses of target and source on the device, and the size in bytes.
Copy = tuple[int, int, int]


@dataclass(frozen=True)
class Captured:
    """An engine captured in a CUDA graph, which reads and writes these tensors only."""

    inputs: Tensors
    outputs: Tensors
    replay: Call


@dataclass(frozen=True)
class CapturedCall:
    """A replay between copies to and from the captured tensors, which stay on the device and take microseconds.

    So any number of runs share one graph a batch size.
    """

    captured: Captured
    copies_in: Sequence[Copy]
    copies_out: Sequence[Copy]
    stream: CudaStream
    #: Keeps the parts of a call together; the stream keeps their order.
    lock: threading.RLock
    #: Whose addresses are used, and which therefore have to live.
    tensors: tuple[Tensors, Tensors]

    def __call__(self) -> None:
        with self.lock:
            for copy in self.copies_in:
                self.stream.copy(*copy)
            self.captured.replay()
            for copy in self.copies_out:
                self.stream.copy(*copy)


#: While a graph is captured nothing else in the process may touch the device, whatever its stream.
DEVICE_LOCK = threading.RLock()


class OrtCudaBackend(OrtBackend):
    """Everything that touches the device holds the process's lock, but for waiting."""

    def __init__(self, bundle: Bundle, *, threads: int | None = None) -> None:
        super().__init__(bundle, "ort-cuda", threads=threads)
        self._lock = DEVICE_LOCK
        self._stream = CudaStream()
        self._ort.preload_dlls()  # CUDA and cuDNN may have come as packages, where no loader looks for them
        self._captured: dict[tuple[str, int], Captured] = {}

    def upload(self, array: Array) -> DeviceTensor:
        with self._lock:
            return super().upload(array)

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> DeviceTensor:
        with self._lock:
            return super().empty(shape, dtype)

    def download(self, tensor: DeviceTensor) -> Array:
        self._stream.synchronize()
        with self._lock:
            return super().download(tensor)

    def bind(self, engine: str, inputs: Tensors, outputs: Tensors) -> Call:
        if engine not in CAPTURED:
            return self._enqueued(engine, inputs, outputs, NO_GRAPH)
        captured = self._capture(engine, inputs, outputs)
        own = self._bundle.manifest.engines[engine]
        return CapturedCall(
            captured,
            [_copy(captured.inputs[tensor.name], inputs[tensor.name]) for tensor in own.inputs],
            [_copy(outputs[tensor.name], captured.outputs[tensor.name]) for tensor in own.outputs],
            self._stream,
            self._lock,
            (inputs, outputs),
        )

    def _capture(self, engine: str, inputs: Tensors, outputs: Tensors) -> Captured:
        """The captured engine for the batch of `inputs`; ONNX Runtime captures it in its first call."""
        own = self._bundle.manifest.engines[engine]
        batch = inputs[own.inputs[0].name].shape()[0]
        with self._lock:
            if (engine, batch) not in self._captured:
                ins, outs = (
                    {tensor.name: self.empty(tuple(tensors[tensor.name].shape()), np.dtype(tensor.dtype)) for tensor in infos}
                    for infos, tensors in ((own.inputs, inputs), (own.outputs, outputs))
                )
                self._captured[engine, batch] = Captured(ins, outs, self._enqueued(engine, ins, outs, batch))
            return self._captured[engine, batch]

    def _enqueued(self, engine: str, inputs: Tensors, outputs: Tensors, graph: int) -> Call:
        """A call on exactly these tensors that does not wait for its end, as the CUDA graph of that number."""
        session, binding = self._bound(engine, inputs, outputs)
        options = self._ort.RunOptions()
        options.add_run_config_entry("gpu_graph_id", str(graph))
        options.add_run_config_entry("disable_synchronize_execution_providers", "1")

        def call() -> None:
            with self._lock:
                session.run_with_iobinding(binding, options)

        return call

    def _provider_options(self, engine: str) -> dict[str, str]:
        graph = {"enable_cuda_graph": "1"} if engine in CAPTURED else {}
        return {**super()._provider_options(engine), "user_compute_stream": str(self._stream.pointer), **graph}


def _copy(target: DeviceTensor, source: DeviceTensor) -> Copy:
    return target.data_ptr(), source.data_ptr(), source.tensor_size_in_bytes()
