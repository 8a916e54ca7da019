"""Eager PyTorch as a backend of the runtime: the same loop over the same graphs, not exported. For parity."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from saferedir.engines import Bundle
from saferedir.engines.errors import SafetyMismatchError
from saferedir.export.graphs import all_graphs
from saferedir_torch.models import SHIPPED_MODEL, SHIPPED_SAFETY, load_pipeline
from saferedir_torch.safety_module import SafetyModule, parameters_sha256


class TorchBackend:
    """Runs the modules that a bundle was exported from; their weights must be the bundle's."""

    name = "torch"

    def __init__(self, bundle: Bundle, model: Path = SHIPPED_MODEL, safety: Path = SHIPPED_SAFETY) -> None:
        pipeline = load_pipeline(model)
        if parameters_sha256(pipeline.unet) != bundle.manifest.model.unet_sha256:
            raise SafetyMismatchError(f"{model} is not the model that {bundle.folder} was made of")
        self._graphs = all_graphs(pipeline, SafetyModule.load(safety))

    def upload(self, array: Any) -> torch.Tensor:
        return torch.from_numpy(np.array(array, order="C"))

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> torch.Tensor:
        return torch.from_numpy(np.empty(shape, dtype))

    def download(self, tensor: torch.Tensor) -> Any:
        return tensor.numpy().copy()

    def bind(self, engine: str, inputs: Mapping[str, torch.Tensor], outputs: Mapping[str, torch.Tensor]) -> Callable[[], None]:
        graph = self._graphs[engine]
        module = graph.module.eval()
        arguments = {name: inputs[name] for name in graph.inputs}

        def call() -> None:
            with torch.no_grad():
                results = module(**arguments)
            results = results if isinstance(results, tuple) else (results,)
            for name, result in zip(graph.outputs, results, strict=True):
                outputs[name].copy_(result)

        return call

    def versions(self) -> dict[str, str]:
        return {"backend": self.name, "torch": version("torch")}
