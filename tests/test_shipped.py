"""What ships: stock diffusers opens the folder; the bundle is made of it; the package stays small."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from diffusers import StableDiffusionPipeline
from msgspec.structs import replace

from saferedir.engines import open_bundle
from saferedir.export.bundle_export import BundleOptions, export_bundle
from saferedir.runtime.verify import verify_bundle
from saferedir_torch.models import SHIPPED_MODEL, SHIPPED_SAFETY, load_pipeline
from saferedir_torch.safety_module import SafetyModule


def test_stock_diffusers_opens_the_folder_and_draws() -> None:
    pipe = StableDiffusionPipeline.from_pretrained(SHIPPED_MODEL, torch_dtype=torch.float32)
    names = (type(pipe.unet).__name__, type(pipe.vae).__name__, type(pipe.text_encoder).__name__)
    assert names == ("UNet2DConditionModel", "AutoencoderKL", "CLIPTextModel")
    image = pipe("a cat", num_inference_steps=4, generator=torch.Generator().manual_seed(0)).images[0]
    assert image.size == (64, 64)
    assert np.asarray(image).std() > 5


def test_folder_is_at_most_30_mb_in_fp16() -> None:
    size = sum(path.stat().st_size for path in Path(SHIPPED_MODEL).rglob("*") if path.is_file())
    assert size <= 30e6


def test_embedded_bundle_equals_the_shipped_reference() -> None:
    report = verify_bundle("emoji-diffusion")
    assert report.parity, report.parity_note
    assert report.passed, [row for row in report.parity if row.worst > row.allowed]


@pytest.mark.slow
def test_a_fresh_export_equals_the_embedded_bundle_to_the_byte_but_for_lines_of_source(tmp_path: Path) -> None:
    embedded = open_bundle("emoji-diffusion")
    options = BundleOptions(name=embedded.manifest.name, max_batch=embedded.manifest.max_batch)
    fresh = open_bundle(export_bundle(load_pipeline(), SafetyModule.load(SHIPPED_SAFETY), tmp_path / "bundle", options))
    if fresh.manifest.made_with != embedded.manifest.made_with:
        pytest.skip(f"made with {fresh.manifest.made_with}, the embedded bundle with {embedded.manifest.made_with}")
    assert fresh.manifest.files.keys() == embedded.manifest.files.keys()
    assert replace(fresh.manifest, files={}) == replace(embedded.manifest, files={})
    for name in fresh.manifest.files:
        found, expected = ((bundle.folder / name).read_bytes() for bundle in (fresh, embedded))
        assert found == expected or (name.endswith(".onnx") and _without_lines(found) == _without_lines(expected)), name


def _without_lines(graph: bytes) -> bytes:
    """The graph without the lines of source that its nodes come from, which any edit above them moves."""
    model = onnx.load_from_string(graph)
    for node in model.graph.node:
        assert {entry.key for entry in node.metadata_props} <= {"source"}
        del node.metadata_props[:]
    return bytes(model.SerializeToString(deterministic=True))


def test_the_bundle_states_what_the_module_was_calibrated_for() -> None:
    config, safety = SafetyModule.load(SHIPPED_SAFETY).config, open_bundle("emoji-diffusion").manifest.safety
    assert [concept.name for concept in safety.concepts] == ["church", "ink", "weapons"]
    assert [concept.threshold for concept in safety.concepts] == [concept.threshold for concept in config.concepts]
    assert config.promise is not None
    assert safety.promise is not None
    assert safety.promise == config.promise
    assert (safety.promise.rate, safety.promise.confidence) == (0.001, 0.95)
    assert safety.promise.pictures >= 3000
