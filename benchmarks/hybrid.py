"""The deployed loop and UNet with a safety module in eager PyTorch: any module or controller, without an export."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import replace

import torch
from msgspec import structs
from torch import Tensor, nn

from saferedir.engines import DEFAULT_BUNDLE, Bundle, open_bundle
from saferedir.engines.step import NUMBERS
from saferedir.export.bundle_export import safety_info
from saferedir.runtime import Pipeline, SafetyPolicy
from saferedir.runtime.backend import Backend, BackendAround, Call, Tensors
from saferedir.runtime.backends import make_backend
from saferedir_torch.controller import Controller, Guided, Policy, Seen, State
from saferedir_torch.safety_module import SafetyModule

STATE = ("prompt", "cooldown", "active", "ok")
VERDICT = ("score", "fired", "token_mask")
_OF_THREAD = threading.local()


class EagerControllerBackend(BackendAround):
    """The best backend of ONNX Runtime here for everything but a controller in eager PyTorch, on the same device."""

    def __init__(self, bundle: Bundle, controller: nn.Module, threads: int | None = None) -> None:
        super().__init__(_backend(bundle, threads))
        self.device = torch.device("cuda" if self.name == "ort-cuda" else "cpu")
        self.controller = controller.to(self.device).eval()
        torch.backends.cudnn.allow_tf32 = False

    def copies(self, tensors: Tensors, rows: int | None) -> dict[str, Tensor]:
        """The controller's copies of an engine's inputs."""
        return {name: torch.from_numpy(self.read(tensor, 0, rows)).to(self.device) for name, tensor in tensors.items()}

    def give(self, results: Mapping[str, Tensor], outputs: Tensors) -> None:
        """What the controller gave, to an engine's outputs."""
        for name, tensor in results.items():
            self.write(outputs[name], 0, tensor.contiguous().cpu().numpy())


def column(numbers: Tensor, name: str) -> Tensor:
    """One of the columns of a step's numbers, [B]."""
    return numbers[:, NUMBERS.index(name)]


def _backend(bundle: Bundle, threads: int | None) -> Backend:
    """One backend a bundle and thread: engines are loaded once, however many controllers stand before them."""
    kept = vars(_OF_THREAD).setdefault("backends", {})
    key = (bundle.folder, threads)
    if key not in kept:
        kept[key] = make_backend(bundle, "auto", threads=threads)
    backend: Backend = kept[key]
    return backend


class HybridBackend(EagerControllerBackend):
    """The controller stands before the plain step."""

    def bind(self, engine: str, inputs: Tensors, outputs: Tensors, rows: int | None = None) -> Call:
        if engine not in ("step", "step_unguided"):
            return super().bind(engine, inputs, outputs, rows)
        plain = super().bind(f"plain_{engine}", {**inputs, "prompt": outputs["next_prompt"]}, outputs, rows)

        @torch.no_grad()
        def call() -> None:
            read = self.copies(inputs, rows)
            seen = read["latent"] * column(read["numbers"], "input_scale")[:, None, None, None]
            state = State(*(read[name] for name in STATE))
            policy, numbers = Policy(read["period"], read["threshold"]), read["numbers"]
            shown = Seen(seen, column(numbers, "noise_share"), read["denoised"], column(numbers, "known") > 0.5)
            guided = Guided(read["negative"], column(numbers, "amplification"))
            state, verdict = self.controller(shown, read["original"], guided, state, policy)
            self.give({f"next_{name}": tensor for name, tensor in zip(STATE, state, strict=True)}, outputs)
            self.give(dict(zip(VERDICT, verdict, strict=True)), outputs)
            plain()

        return call


def hybrid_pipeline(
    module: SafetyModule,
    *,
    controller: nn.Module | None = None,
    policy: SafetyPolicy | None = None,
    bundle: str = DEFAULT_BUNDLE,
    threads: int | None = None,
) -> Pipeline:
    """The base model of `bundle` under `module` (through `controller`, where it is not the usual one)."""
    opened = open_bundle(bundle)
    with_concepts = replace(opened, manifest=structs.replace(opened.manifest, safety=safety_info(module.config)))
    return Pipeline(with_concepts, HybridBackend(with_concepts, controller or Controller(module), threads), policy)
