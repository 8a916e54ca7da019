"""ONNX Runtime's CUDA provider: steps of resident rows are captured in CUDA graphs."""

from __future__ import annotations

import itertools

from saferedir.engines import Bundle
from saferedir.engines.manifest import kind
from saferedir.engines.step import STEPS
from saferedir.runtime.backend import Call, Tensors
from saferedir.runtime.ort_stream import OrtStreamBackend


class OrtCudaBackend(OrtStreamBackend):
    """One graph for each step that is bound to resident rows, captured by ONNX Runtime when it is called first."""

    captures = True

    def __init__(self, bundle: Bundle, *, threads: int | None = None) -> None:
        super().__init__(bundle, "ort-cuda", threads=threads)
        self._ort.preload_dlls()  # CUDA and cuDNN may have come as packages, where no loader looks for them
        self._graphs = itertools.count(1)

    def bind(self, engine: str, inputs: Tensors, outputs: Tensors, rows: int | None = None) -> Call:
        if rows is None or kind(engine) not in STEPS:
            return super().bind(engine, inputs, outputs, rows)
        return self._enqueued(self._bound(engine, inputs, outputs, rows), next(self._graphs))

    def _provider_options(self, engine: str) -> dict[str, str]:
        graph = {"enable_cuda_graph": "1"} if kind(engine) in STEPS else {}
        return {**super()._provider_options(engine), **graph}
