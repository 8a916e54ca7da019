"""The models that are measured: the embedded one with its own weights, and two of common shapes with random ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.contestants import unsaved_bundle
from benchmarks.gpu.graphs import NOTHING, UNET, parts_of, step_graphs
from benchmarks.gpu.shapes import Shape, build_unet, shapes
from saferedir.engines import Bundle, open_bundle
from saferedir.engines.bundle import DEFAULT_BUNDLE
from saferedir.export.engine_graph import step_example
from saferedir_torch.models import SHIPPED_SAFETY, load_pipeline
from saferedir_torch.safety_module import SafetyModule

EMBEDDED = "embedded"


@dataclass(frozen=True)
class Subject:
    """One model, in all that contestants take it from."""

    name: str
    title: str
    #: What the UNet computes in; the safety computes in fp32.
    precision: str
    bundle: Bundle
    #: The same safety before a denoiser that costs next to nothing.
    alone: Bundle | None
    #: UNet and safety in PyTorch, on the device.
    eager: Callable[[], tuple[Any, SafetyModule]]
    #: Inputs of a step, for a batch of so many requests.
    example: Callable[[int], dict[str, Tensor]]
    #: Of the latent's sides and the prompt.
    sizes: dict[str, int]
    safety_parameters: int


def names() -> tuple[str, ...]:
    return (EMBEDDED, *(shape.name for shape in shapes(tiny=True)))


def subject(name: str, device: torch.device, folder: Path, *, tiny: bool) -> Subject:
    """The model of that name; its graphs, where it needs any, are kept in `folder`."""
    if name == EMBEDDED:
        return _embedded(device)
    return _of_shape(next(shape for shape in shapes(tiny=tiny) if shape.name == name), device, folder)


def _embedded(device: torch.device) -> Subject:
    bundle, shipped = open_bundle(DEFAULT_BUNDLE), SafetyModule.load(SHIPPED_SAFETY)
    model, safety = bundle.manifest.model, bundle.manifest.safety
    assert model is not None

    def example(batch: int) -> dict[str, Tensor]:
        latent = torch.randn(batch, model.latent_channels, model.latent_height, model.latent_width)
        return step_example(latent, torch.randn(batch, model.prompt_tokens, model.prompt_width), len(safety.concepts))

    def eager() -> tuple[Any, SafetyModule]:
        return load_pipeline().unet.to(device), shipped

    sizes = {"latent": model.latent_height, "tokens": model.prompt_tokens, "width": model.prompt_width}
    precision = bundle.manifest.precision.compute
    return Subject(EMBEDDED, "the embedded model", precision, bundle, None, eager, example, sizes, _parameters(shipped))


def _of_shape(shape: Shape, device: torch.device, folder: Path) -> Subject:
    parts = parts_of(shape)
    graphs = step_graphs(parts, folder)
    parts.unet.fill(device)
    weights = parts.weights()

    def eager() -> tuple[Any, SafetyModule]:
        stored = parts.unet.network.unet.state_dict()  # type: ignore[union-attr]
        unet = build_unet(shape)
        unet.load_state_dict({key: own.to(device, torch.float16).contiguous() for key, own in stored.items()}, assign=True)
        return unet.to(device), parts.module

    whole, alone = (unsaved_bundle(shape.name, graphs[denoiser], weights) for denoiser in (UNET, NOTHING))
    sizes = {"latent": shape.side, "tokens": shape.tokens, "width": shape.width}
    parameters = _parameters(parts.module)
    return Subject(shape.name, shape.title, "float16", whole, alone, eager, parts.example, sizes, parameters)


def _parameters(module: SafetyModule) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
