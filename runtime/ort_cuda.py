"""ONNX Runtime's CUDA provider: steps are captured in CUDA graphs."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from saferedir.engines import Bundle
from saferedir.engines.manifest import kind
from saferedir.engines.step import STEPS
from saferedir.runtime.backend import Call, DeviceTensor
from saferedir.runtime.cuda import CudaStream
from saferedir.runtime.ort_stream import OrtStreamBackend, Tensors

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


class OrtCudaBackend(OrtStreamBackend):
    """One graph for each kind of step and batch size, captured when first asked for and shared by all runs."""

    def __init__(self, bundle: Bundle, *, threads: int | None = None) -> None:
        super().__init__(bundle, "ort-cuda", threads=threads)
        self._ort.preload_dlls()  # CUDA and cuDNN may have come as packages, where no loader looks for them
        self._captured: dict[tuple[str, int], Captured] = {}

    def bind(self, engine: str, inputs: Tensors, outputs: Tensors) -> Call:
        if kind(engine) not in STEPS:
            return super().bind(engine, inputs, outputs)
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

    def _provider_options(self, engine: str) -> dict[str, str]:
        graph = {"enable_cuda_graph": "1"} if kind(engine) in STEPS else {}
        return {**super()._provider_options(engine), **graph}


def _copy(target: DeviceTensor, source: DeviceTensor) -> Copy:
    return target.data_ptr(), source.data_ptr(), source.tensor_size_in_bytes()
