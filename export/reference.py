"""What the engines of a bundle were exported from: the same graphs in eager PyTorch, refused where they are another model's."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from saferedir.engines import Bundle
from saferedir.engines.errors import RequestError, SafetyMismatchError
from saferedir.engines.manifest import PUBLISHED
from saferedir.export.engine_graph import Graph
from saferedir.export.graphs import all_graphs
from saferedir.export.published_graphs import published_graphs
from saferedir_torch.fit import encoder_hashes
from saferedir_torch.models import SHIPPED_MODEL, SHIPPED_SAFETY, load_pipeline
from saferedir_torch.published_checkpoint import load_published
from saferedir_torch.safety_module import SafetyModule, parameters_sha256


class Reference(NamedTuple):
    """The pipeline, None for a bundle that holds a safety alone, and the graph of every engine."""

    pipeline: Any | None
    graphs: dict[str, Graph]


def open_reference(bundle: Bundle, model: Path | None = None, safety: Path | None = None) -> Reference:
    """The reference of `bundle` from a model folder and a safety module (of a published one: its checkpoint).

    Raises:
        SafetyMismatchError: the text encoder or UNet is not the bundle's.
        RequestError: no checkpoint was named for a published bundle, or it cannot be read.
    """
    manifest = bundle.manifest
    pipeline: Any = None
    if manifest.model is not None:
        pipeline = load_pipeline(model or SHIPPED_MODEL)
        hashes = (encoder_hashes(pipeline).through_fp16, parameters_sha256(pipeline.unet))
        if hashes != (manifest.model.text_encoder_sha256, manifest.model.unet_sha256):
            raise SafetyMismatchError(
                f"the reference in {model or SHIPPED_MODEL} is not the model that {bundle.folder} was made of"
            )
    if manifest.controller != PUBLISHED:
        further = manifest.model.further_sizes if manifest.model else ()
        return Reference(pipeline, all_graphs(pipeline, SafetyModule.load(safety or SHIPPED_SAFETY), further))
    if safety is None:
        raise RequestError(f"{bundle.folder} was made of a published checkpoint; name it by --safety to compare with it")
    network = load_published(safety)
    return Reference(pipeline, published_graphs(pipeline, network, mask_again=manifest.safety.mask_again))
