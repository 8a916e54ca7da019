"""Eager PyTorch as a backend of the runtime: the same loop over the same graphs, not exported. For parity."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from saferedir.engines import Bundle
from saferedir.export.reference import open_reference


class TorchBackend:
    """Runs the modules that a bundle was exported from; their weights must be the bundle's."""

    name, captures = "torch", False

    def __init__(self, bundle: Bundle, model: Path | None = None, safety: Path | None = None) -> None:
        self._graphs = open_reference(bundle, model, safety).graphs

    def upload(self, array: Any) -> torch.Tensor:
        return torch.from_numpy(np.array(array, order="C"))

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> torch.Tensor:
        return torch.from_numpy(np.empty(shape, dtype))

    def bind(
        self, engine: str, inputs: Mapping[str, torch.Tensor], outputs: Mapping[str, torch.Tensor], rows: int | None = None
    ) -> Callable[[], None]:
        graph = self._graphs[engine]
        module = graph.module.eval()
        arguments = [inputs[name][:rows] for name in graph.inputs]

        def call() -> None:
            with torch.no_grad():
                results = module(*arguments)
            results = results if isinstance(results, tuple) else (results,)
            for name, result in zip(graph.outputs, results, strict=True):
                outputs[name][:rows].copy_(result)

        return call

    def write(self, tensor: torch.Tensor, row: int, values: Any) -> None:
        tensor[row : row + len(values)] = torch.from_numpy(np.asarray(values))

    def move(self, tensor: torch.Tensor, target: int, source: int) -> None:
        tensor[target] = tensor[source]

    def read(self, tensor: torch.Tensor, row: int = 0, rows: int | None = None) -> Any:
        return tensor[row : None if rows is None else row + rows].numpy().copy()

    def versions(self) -> dict[str, str]:
        return {"backend": self.name, "torch": version("torch")}
