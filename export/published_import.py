"""A published checkpoint to a bundle whose network and controller are those of the authors' released code."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saferedir.engines.errors import RequestError, SafetyMismatchError
from saferedir.engines.manifest import PUBLISHED, ConceptInfo, SafetyInfo
from saferedir.export.bundle_export import BundleOptions, write_bundle
from saferedir.export.published_graphs import published_graphs
from saferedir.export.weights import WeightFile
from saferedir_torch.fit import encoder_hashes
from saferedir_torch.published import PublishedNetwork
from saferedir_torch.safety_module import parameters_sha256


@dataclass(frozen=True, kw_only=True)
class PublishedOptions:
    """What a checkpoint does not say; the defaults are those of the released code."""

    #: What the checkpoint forgets, for records and messages.
    concept: str = "unsafe"
    #: What it is redirected to, for people.
    replacement: str = "safe"
    cooldown: int = 2
    alpha_scale: float = 1.25
    #: The variant that multiplies displacements by the mask.
    mask_again: bool = False

    def check(self) -> None:
        """Raise `RequestError` where a value is out of range."""
        if not self.concept:
            raise RequestError("concept is empty; name what the checkpoint forgets")
        if not 0 <= self.cooldown <= 1000:
            raise RequestError(f"cooldown is {self.cooldown}; expected 0 to 1000 steps")
        if not (math.isfinite(self.alpha_scale) and self.alpha_scale > 0):
            raise RequestError(f"alpha_scale is {self.alpha_scale}; expected a finite value above 0")


def import_published(
    network: PublishedNetwork,
    out: Path,
    options: PublishedOptions,
    bundle: BundleOptions,
    *,
    pipeline: Any | None,
    on_engine: Callable[[str], None] | None = None,
) -> Path:
    """Write the bundle of `network` to `out`: with `pipeline` one that draws, else the safety and the bare network alone.

    Raises:
        RequestError: an option is out of range.
        SafetyMismatchError: the network is made for other shapes than the pipeline's.
        ExportError: a graph cannot be exported, or the scheduler clips or thresholds.
    """
    options.check()
    if pipeline is not None:
        _check_shapes(network, pipeline)
    info = SafetyInfo(
        # A checkpoint does not say which model it was trained with; its shapes fit this one.
        text_encoder_sha256="" if pipeline is None else encoder_hashes(pipeline).through_fp16,
        unet_sha256="" if pipeline is None else parameters_sha256(pipeline.unet),
        prompt_tokens=network.pos_embed.shape[1],
        prompt_width=network.pos_embed.shape[2],
        latent_channels=network.channels,
        cooldown=options.cooldown,
        concepts=(ConceptInfo(options.concept, options.replacement, None, options.alpha_scale),),
        mask_again=options.mask_again,
    )
    return write_bundle(
        out, pipeline, lambda computing: published_graphs(computing, network, mask_again=options.mask_again),
        WeightFile("safety.safetensors", network), info, bundle, controller=PUBLISHED, on_engine=on_engine,
    )  # fmt: skip


def _check_shapes(network: PublishedNetwork, pipeline: Any) -> None:
    _, tokens, width = network.pos_embed.shape
    facts = {
        "latent channels": (network.channels, pipeline.unet.config.in_channels),
        "prompt tokens": (tokens, pipeline.tokenizer.model_max_length),
        "prompt width": (width, pipeline.unet.config.cross_attention_dim),
    }
    for fact, (expected, found) in facts.items():
        if expected != found:
            raise SafetyMismatchError(f"{fact}: the checkpoint is made for {expected}, the pipeline has {found}")
