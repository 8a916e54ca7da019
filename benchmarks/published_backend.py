"""The published controller around the deployed UNet in eager PyTorch: any network, without an export."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch

from saferedir.engines import Bundle
from saferedir.engines.manifest import PUBLISHED, SafetyInfo
from saferedir.runtime.backend import Call, DeviceTensor
from saferedir.runtime.ort import OrtBackend
from saferedir_torch.published import PublishedNetwork
from saferedir_torch.published_controller import PublishedController, PublishedPolicy, PublishedState

STATE = ("prompt", "negative", "cooldown", "active", "ok")


def published_bundle(opened: Bundle, safety: SafetyInfo) -> Bundle:
    """The model of `opened` under the published controller; its safety has one concept."""
    return replace(opened, manifest=replace(opened.manifest, controller=PUBLISHED, safety=safety))


class PublishedBackend(OrtBackend):
    """ONNX Runtime for the model, `network` in eager PyTorch after every guided plain step."""

    def __init__(self, bundle: Bundle, network: PublishedNetwork, threads: int | None = None) -> None:
        super().__init__(bundle, "ort-cpu", threads=threads)
        self.controller = PublishedController(network).eval()

    def bind(self, engine: str, inputs: Mapping[str, DeviceTensor], outputs: Mapping[str, DeviceTensor]) -> Call:
        if engine != "step":
            return super().bind(engine, inputs, outputs)
        plain = super().bind("plain_step", inputs, outputs)

        @torch.no_grad()
        def call() -> None:
            plain()
            read = {name: torch.from_numpy(tensor.numpy()) for name, tensor in inputs.items()}
            seen = read["latent"] * read["input_scale"][:, None, None, None]
            before = PublishedState(*(read[name] for name in STATE))
            policy = PublishedPolicy(read["period"], read["enabled"], read["alpha_scale"])
            original, negative = read["original"], read["original_negative"]
            state, verdict = self.controller(seen, read["timestep"], original, negative, before, policy)
            results = {f"next_{name}": tensor for name, tensor in state._asdict().items()} | verdict._asdict()
            for name, tensor in results.items():
                outputs[name].update_inplace(np.ascontiguousarray(tensor.numpy()))

        return call
