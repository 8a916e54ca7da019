"""A bundle is checked when it is opened; each fault names the file."""

from __future__ import annotations

from pathlib import Path

import pytest

from saferedir.engines import open_bundle
from saferedir.engines.errors import (
    BundleAlteredError,
    BundleMissingFileError,
    BundleSchemaError,
    SafetyMismatchError,
    SafetyMissingError,
)
from saferedir.engines.manifest import MANIFEST_FILE, Manifest


def test_embedded_bundle_opens() -> None:
    bundle = open_bundle("emoji-diffusion")
    assert bundle.manifest.safety.concepts[0].name == "church"


def test_manifest_survives_a_round_trip() -> None:
    manifest = open_bundle("emoji-diffusion").manifest
    assert Manifest.from_json(manifest.to_json(), "again") == manifest


def test_unet_and_step_share_one_weight_file() -> None:
    engines = open_bundle("emoji-diffusion").manifest.engines
    assert set(engines["plain_step"].weights) <= set(engines["step"].weights)
    assert "safety.safetensors" in engines["step"].weights


def test_unknown_name_lists_what_is_embedded(tmp_path: Path) -> None:
    with pytest.raises(BundleMissingFileError, match="emoji-diffusion"):
        open_bundle(tmp_path / "nowhere")


def test_folder_without_manifest(tmp_path: Path) -> None:
    with pytest.raises(BundleMissingFileError, match=MANIFEST_FILE):
        open_bundle(tmp_path)


@pytest.mark.parametrize("name", ["unet.safetensors", "step.onnx", "tokenizer.json"])
def test_missing_file_is_named(bundle_copy: Path, name: str) -> None:
    (bundle_copy / name).unlink()
    with pytest.raises(BundleMissingFileError, match=name):
        open_bundle(bundle_copy)


@pytest.mark.parametrize("name", ["safety.safetensors", "plain_step.onnx", "tokenizer.json"])
def test_one_changed_byte_is_found(bundle_copy: Path, name: str) -> None:
    data = bytearray((bundle_copy / name).read_bytes())
    data[len(data) // 2] ^= 1
    (bundle_copy / name).write_bytes(data)
    with pytest.raises(BundleAlteredError, match=name):
        open_bundle(bundle_copy)


def test_a_cut_file_is_found(bundle_copy: Path) -> None:
    data = (bundle_copy / "unet.safetensors").read_bytes()
    (bundle_copy / "unet.safetensors").write_bytes(data[:-1])
    with pytest.raises(BundleAlteredError, match=r"unet\.safetensors has \d+ bytes"):
        open_bundle(bundle_copy)


def test_newer_schema_asks_for_an_upgrade(bundle_copy, edit_manifest) -> None:  # type: ignore[no-untyped-def]
    edit_manifest(bundle_copy, lambda raw: raw.update(schema_version=99))
    with pytest.raises(BundleSchemaError, match="upgrade"):
        open_bundle(bundle_copy)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"schema_version": "1"}', '{"schema_version": 1}'])
def test_malformed_manifest(bundle_copy: Path, text: str) -> None:
    (bundle_copy / MANIFEST_FILE).write_text(text)
    with pytest.raises(BundleAlteredError, match=MANIFEST_FILE):
        open_bundle(bundle_copy)


def test_safety_engine_missing(bundle_copy, edit_manifest) -> None:  # type: ignore[no-untyped-def]
    edit_manifest(bundle_copy, lambda raw: raw["engines"].pop("step"))
    with pytest.raises(SafetyMissingError, match="step"):
        open_bundle(bundle_copy)


def test_safety_without_concepts(bundle_copy, edit_manifest) -> None:  # type: ignore[no-untyped-def]
    edit_manifest(bundle_copy, lambda raw: raw["safety"].update(concepts=[]))
    with pytest.raises(SafetyMissingError):
        open_bundle(bundle_copy)


@pytest.mark.parametrize(("field", "value"), [("prompt_width", 64), ("latent_channels", 8), ("text_encoder_sha256", "0" * 64)])
def test_safety_of_another_model(bundle_copy, edit_manifest, field, value) -> None:  # type: ignore[no-untyped-def]
    edit_manifest(bundle_copy, lambda raw: raw["safety"].update({field: value}))
    with pytest.raises(SafetyMismatchError, match=str(value)):
        open_bundle(bundle_copy)


def test_engine_without_hash(bundle_copy, edit_manifest) -> None:  # type: ignore[no-untyped-def]
    edit_manifest(bundle_copy, lambda raw: raw["files"].pop("step.onnx"))
    with pytest.raises(BundleAlteredError, match=r"step\.onnx"):
        open_bundle(bundle_copy)


def test_file_outside_of_the_bundle(bundle_copy, edit_manifest) -> None:  # type: ignore[no-untyped-def]
    edit_manifest(bundle_copy, lambda raw: raw["files"].update({"../x": {"sha256": "", "bytes": 0}}))
    with pytest.raises(BundleAlteredError, match="outside"):
        open_bundle(bundle_copy)
