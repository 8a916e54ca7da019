"""The published controller around the deployed UNet in eager PyTorch: any network, without an export."""

from __future__ import annotations

from dataclasses import replace

import torch
from msgspec import structs

from benchmarks.hybrid import EagerControllerBackend, column
from saferedir.engines import Bundle
from saferedir.engines.manifest import PUBLISHED, SafetyInfo
from saferedir.runtime.backend import Call, Tensors
from saferedir_torch.published import PublishedNetwork
from saferedir_torch.published_controller import PublishedController, PublishedPolicy, PublishedState

STATE = ("prompt", "negative", "cooldown", "active", "ok")


def published_bundle(opened: Bundle, safety: SafetyInfo) -> Bundle:
    """The model of `opened` under the published controller; its safety has one concept."""
    return replace(opened, manifest=structs.replace(opened.manifest, controller=PUBLISHED, safety=safety))


class PublishedBackend(EagerControllerBackend):
    """`network` comes after every guided plain step."""

    def __init__(self, bundle: Bundle, network: PublishedNetwork, threads: int | None = None) -> None:
        super().__init__(bundle, PublishedController(network), threads)

    def bind(self, engine: str, inputs: Tensors, outputs: Tensors, rows: int | None = None) -> Call:
        if engine != "step":
            return super().bind(engine, inputs, outputs, rows)
        plain = super().bind("plain_step", inputs, outputs, rows)

        @torch.no_grad()
        def call() -> None:
            plain()
            read = self.copies(inputs, rows)
            seen = read["latent"] * column(read["numbers"], "input_scale")[:, None, None, None]
            before = PublishedState(*(read[name] for name in STATE))
            policy = PublishedPolicy(read["period"], read["enabled"], read["alpha_scale"])
            original, negative = read["original"], read["original_negative"]
            state, verdict = self.controller(seen, read["timestep"], original, negative, before, policy)
            self.give({f"next_{name}": tensor for name, tensor in state._asdict().items()} | verdict._asdict(), outputs)

        return call
