"""A denoising step with and without safety, as each contestant takes it: ONNX Runtime, eager PyTorch, compiled PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch
from msgspec.structs import replace
from torch import Tensor

from saferedir.engines import Bundle, open_bundle
from saferedir.engines.bundle import DEFAULT_BUNDLE, EngineBytes
from saferedir.engines.manifest import EngineInfo
from saferedir.engines.step import step_inputs, step_outputs
from saferedir.export.engine_graph import StepModule
from saferedir.export.graphs import StepGraph
from saferedir.export.model_graphs import PlainStepGraph
from saferedir.export.onnx_export import tensor_infos
from saferedir.export.safety_graphs import SafetyGraph
from saferedir.runtime.backends import make_backend
from saferedir.runtime.ort_stream import OrtStreamBackend
from saferedir_torch.safety_module import SafetyModule

#: Of `torch.compile` on a GPU: steps are captured in CUDA graphs, as ONNX Runtime's are.
MODE = "reduce-overhead"
Step = Callable[[], object]


@dataclass(frozen=True)
class Pair:
    """One denoising step of a batch, in two ways that differ by the safety alone."""

    protected: Step
    plain: Step
    #: The latent that a plain step leaves, on the host.
    drawn: Callable[[], npt.NDArray[np.float32]]
    #: CUDA's stream that they are enqueued on; None: PyTorch's own.
    stream: int | None = None


@dataclass(frozen=True)
class UnsavedBundle(Bundle):
    """A bundle of steps alone, in memory; weights are not hashed, since nobody else could have touched them."""

    graphs: Mapping[str, bytes] = field(default_factory=dict)
    weights: Mapping[str, Any] = field(default_factory=dict)

    def engine(self, name: str) -> EngineBytes:
        used = self.manifest.engines[name].weights
        return EngineBytes(self.graphs[name], {file: self.weights[file] for file in used})


def unsaved_bundle(name: str, graphs: Mapping[str, bytes], weights: Mapping[str, Any]) -> UnsavedBundle:
    """A bundle of that name, of these step graphs, and of those of the weights that they read."""
    engines = {}
    for step, data in graphs.items():
        graph = onnx.load_from_string(data).graph
        located = {entry.value for tensor in graph.initializer for entry in tensor.external_data if entry.key == "location"}
        engines[step] = EngineInfo(
            f"{step}.onnx", tuple(sorted(located)), tensor_infos(graph.input), tensor_infos(graph.output)
        )
    manifest = replace(open_bundle(DEFAULT_BUNDLE).manifest, name=name, engines=engines)
    return UnsavedBundle(Path(name), manifest, "", graphs, weights)


class Runtime:
    """The product's own backend; on a GPU every step is captured in a CUDA graph, as it is when pictures are drawn."""

    def __init__(self, bundle: Bundle, backend: str) -> None:
        self._bundle, self._backend = bundle, make_backend(bundle, backend)

    def steps(self, example: Mapping[str, Tensor]) -> Pair:
        protected, _ = self._bound("step", example)
        plain, outputs = self._bound("plain_step", example)

        def drawn() -> npt.NDArray[np.float32]:
            plain()
            return self._backend.read(outputs["next_latent"])

        stream = self._backend._stream.pointer if isinstance(self._backend, OrtStreamBackend) else None
        return Pair(protected, plain, drawn, stream)

    def _bound(self, engine: str, example: Mapping[str, Tensor]) -> tuple[Step, dict[str, Any]]:
        """A call of the engine, and what it writes to."""
        info = self._bundle.manifest.engines[engine]
        sizes: dict[str | int, int] = {"batch": len(example["latent"])}
        inputs = {tensor.name: self._backend.upload(example[tensor.name].numpy()) for tensor in info.inputs}
        outputs = {
            tensor.name: self._backend.empty(
                tuple(sizes[size] if isinstance(size, str) else size for size in tensor.shape), np.dtype(tensor.dtype)
            )
            for tensor in info.outputs
        }
        return self._backend.bind(engine, inputs, outputs, rows=len(example["latent"])), outputs


class Eager:
    """The same step in PyTorch, kernel by kernel: diffusers' UNet, and around it the modules that graphs are traced from."""

    def __init__(self, unet: Any, module: SafetyModule, device: torch.device) -> None:
        self._device = device
        self._plain = PlainStepGraph(unet, guided=True)
        self._safety = SafetyGraph(module.to(device))
        self._protected = StepGraph(self._safety, self._plain)

    def steps(self, example: Mapping[str, Tensor]) -> Pair:
        plain = self._called(self._plain, example)
        latent = step_outputs(self._plain.form).index("next_latent")
        return Pair(self._called(self._protected, example), plain, lambda: plain()[latent].cpu().numpy())

    def _called(self, step: StepModule, example: Mapping[str, Tensor]) -> Callable[[], tuple[Tensor, ...]]:
        inputs = [example[name].to(self._device) for name in step_inputs(step.form)]

        @torch.no_grad()
        def call() -> tuple[Tensor, ...]:
            given: tuple[Tensor, ...] = step(*inputs)
            return given

        return call


class Compiled(Eager):
    """The same with UNet and safety compiled, each once for all batches."""

    def __init__(self, unet: Any, module: SafetyModule, device: torch.device) -> None:
        #: Without a GPU nothing is made faster; it shows that all can be compiled.
        how: dict[str, Any] = {"mode": MODE} if device.type == "cuda" else {"backend": "eager"}
        super().__init__(torch.compile(unet, dynamic=True, **how), module, device)
        self._safety.controller.compile(dynamic=True, **how)

    def _called(self, step: StepModule, example: Mapping[str, Tensor]) -> Callable[[], tuple[Tensor, ...]]:
        call = super()._called(step, example)

        def marked() -> tuple[Tensor, ...]:
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]  # what the last step gave may be written over
            return call()

        return marked
