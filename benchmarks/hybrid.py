"""The deployed loop and UNet with a safety module in eager PyTorch: any module or controller, without an export."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from saferedir.engines import DEFAULT_BUNDLE, open_bundle
from saferedir.export.bundle_export import safety_info
from saferedir.runtime import Pipeline, SafetyPolicy
from saferedir.runtime.backend import Call, DeviceTensor
from saferedir.runtime.ort import OrtBackend
from saferedir_torch.controller import Controller, Policy, State
from saferedir_torch.safety_module import SafetyModule

STATE = ("prompt", "cooldown", "active", "ok")
VERDICT = ("score", "fired", "token_mask")


class HybridBackend(OrtBackend):
    """ONNX Runtime for everything but the controller, which stands before the plain step."""

    def __init__(self, bundle: Any, controller: nn.Module, threads: int | None = None) -> None:
        super().__init__(bundle, "ort-cpu", threads=threads)
        self.controller = controller.eval()

    def bind(self, engine: str, inputs: Mapping[str, DeviceTensor], outputs: Mapping[str, DeviceTensor]) -> Call:
        if engine not in ("step", "step_unguided"):
            return super().bind(engine, inputs, outputs)
        plain = super().bind(f"plain_{engine}", {**inputs, "prompt": outputs["next_prompt"]}, outputs)

        @torch.no_grad()
        def call() -> None:
            read = {name: torch.from_numpy(tensor.numpy()) for name, tensor in inputs.items()}
            seen = read["latent"] * read["input_scale"][:, None, None, None]
            state = State(*(read[name] for name in STATE))
            policy = Policy(read["period"], read["enabled"], read["threshold"], read["alpha_scale"])
            state, verdict = self.controller(seen, read["timestep"], read["original"], state, policy)
            for name, tensor in zip(STATE, state, strict=True):
                outputs[f"next_{name}"].update_inplace(tensor.contiguous().numpy())
            for name, tensor in zip(VERDICT, verdict, strict=True):
                outputs[name].update_inplace(tensor.contiguous().numpy())
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
    with_concepts = replace(opened, manifest=replace(opened.manifest, safety=safety_info(module.config)))
    return Pipeline(with_concepts, HybridBackend(with_concepts, controller or Controller(module), threads), policy)
