"""Export of a small pipeline of the true classes: every engine equals its reference, and a planted difference is found."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from small_module import lively

from benchmarks.small_pipeline import SMALL, save_small_pipeline
from saferedir.engines import open_bundle
from saferedir.engines.errors import ExportError, OutputError, RequestError, SafetyMismatchError, VerificationError
from saferedir.engines.step import PROTECTED_STEPS
from saferedir.export.bundle_export import BundleOptions, export_bundle
from saferedir.export.command import export_folder
from saferedir.runtime import Pipeline, SafetyPolicy
from saferedir.runtime.verify import verify_bundle
from saferedir_torch.models import SHIPPED_MODEL, load_pipeline
from saferedir_torch.new_module import extended_module, new_module
from saferedir_torch.safety_module import SafetyModule
from saferedir_torch.world.source import AddedPrompts, WorldPrompts
from saferedir_torch.world.split import load_split

TWO_CONCEPTS = ("church", "weapons")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("small")


@pytest.fixture(scope="module")
def small(folder: Path) -> tuple[Any, SafetyModule]:
    """A pipeline with random weights, width 32, and a safety module of two concepts and an added one for it."""
    save_small_pipeline(folder / "model", width=32, heads=2)
    pipeline = load_pipeline(folder / "model")
    base = new_module(pipeline, WorldPrompts(TWO_CONCEPTS, load_split()), 0, **SMALL)
    extended = extended_module(base, pipeline, AddedPrompts("teddy", TWO_CONCEPTS, load_split()), 0)
    lively(extended.eval()).save(folder / "safety")
    return pipeline, SafetyModule.load(folder / "safety")


@pytest.fixture(scope="module")
def exported(small: tuple[Any, SafetyModule], folder: Path) -> Path:
    steps: list[tuple[int, int]] = []
    sizes: list[int] = []
    out = export_folder(
        folder / "model", folder / "safety", folder / "bundle", BundleOptions(name="small", max_batch=3),
        on_step=lambda done, total: steps.append((done, total)), on_size=sizes.append,
    )  # fmt: skip
    assert steps == [(done, 6) for done in range(7)]
    # A small model's graphs are most of it; of a large one they are nothing.
    assert sum(path.stat().st_size for path in out.iterdir()) <= sizes[0] <= 5_000_000
    return out


def test_every_engine_equals_its_reference(exported: Path, folder: Path) -> None:
    report = verify_bundle(exported, folder / "model", folder / "safety")
    assert report.passed
    assert report.parity is not None
    assert {row.engine for row in report.parity} == set(open_bundle(exported).manifest.engines)


def test_large_weights_are_outside_and_in_half_precision(exported: Path) -> None:
    graph = onnx.load(exported / "step.onnx", load_external_data=False)
    stored = [t for t in graph.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
    assert stored
    assert sum(t.data_type == onnx.TensorProto.FLOAT16 for t in stored) > 0.9 * len(stored)
    assert not any("/" in value.value for t in stored for value in t.external_data)


def test_graphs_hold_no_path_of_this_machine(exported: Path) -> None:
    for path in exported.glob("*.onnx"):
        assert str(Path(__file__).parents[1]).encode() not in path.read_bytes()


def test_concepts_fire_for_themselves(exported: Path) -> None:
    policy = SafetyPolicy(thresholds={"church": 0.0, "weapons": 1.0, "teddy": 1.0})
    one = Pipeline.from_bundle(exported, policy=policy)("a church", num_inference_steps=4).records[0]
    assert all(set(step.score) == {"church", "weapons", "teddy"} for step in one.steps)
    assert set(one.token_mask) == {"church"}
    both = SafetyPolicy(thresholds={"church": 0.0, "weapons": 0.0}, enabled=("weapons",))
    added = SafetyPolicy(thresholds={"teddy": 0.0}, enabled=("teddy",))
    assert set(Pipeline.from_bundle(exported, policy=added)("a", num_inference_steps=4).records[0].token_mask) == {"teddy"}
    assert Pipeline.from_bundle(exported, policy=both)("a", num_inference_steps=4).records[0].steps[0].fired == ("weapons",)


def test_another_reference_is_refused(exported: Path, folder: Path) -> None:
    with pytest.raises(SafetyMismatchError, match="not the model"):
        verify_bundle(exported, SHIPPED_MODEL, folder / "safety")


@pytest.mark.slow
def test_planted_difference_is_found(exported: Path, folder: Path, small: tuple[Any, SafetyModule]) -> None:
    changed = SafetyModule(small[1].config)
    changed.load_state_dict(small[1].state_dict())
    with torch.no_grad():
        changed.branches[0].detector.head.bias += 0.05
    changed.save(folder / "changed")
    report = verify_bundle(exported, folder / "model", folder / "changed", bisect=True)
    assert not report.passed
    wrong = {(row.engine, row.output) for row in report.parity or [] if not row.passed}
    assert {("step", "score"), ("step_unguided", "score")} <= wrong
    assert not any(engine not in PROTECTED_STEPS for engine, _ in wrong)
    assert VerificationError.exit_code == 7
    assert report.pictures is not None
    assert report.pictures.worst_score > 1e-3
    found, other = report.bisected
    assert (other.engine, other.node) == ("step_unguided", found.node)
    assert (found.engine, found.operator, found.worst) == ("step", "Gemm", pytest.approx(0.05, rel=0.01))
    assert 0 < found.equal_before < found.tensors
    assert str(found.source).startswith("saferedir_torch/detector.py:")


def test_safety_of_another_model_is_refused_and_leaves_nothing(small: tuple[Any, SafetyModule], tmp_path: Path) -> None:
    with pytest.raises(SafetyMismatchError):
        export_bundle(load_pipeline(), small[1], tmp_path / "bundle", BundleOptions(name="x"))
    assert list(tmp_path.iterdir()) == []


def test_an_export_that_fails_leaves_nothing(small: tuple[Any, SafetyModule], tmp_path: Path) -> None:
    def fail(name: str) -> None:
        if name == "plain_step":
            raise ExportError("planted")

    with pytest.raises(ExportError):
        export_bundle(*small, tmp_path / "bundle", BundleOptions(name="x"), fail)
    assert list(tmp_path.iterdir()) == []


def export_to(model: Path, safety: Path, out: Path) -> Path:
    return export_folder(model, safety, out, BundleOptions(name="x", max_batch=3), on_step=lambda done, total: None)


def test_folders_that_are_not_what_they_should_be(small: tuple[Any, SafetyModule], folder: Path, tmp_path: Path) -> None:
    assert small
    model, safety, out = folder / "model", folder / "safety", tmp_path / "bundle"
    empty, file = tmp_path / "empty", tmp_path / "file"
    empty.mkdir()
    file.write_bytes(b"")
    with pytest.raises(RequestError, match=r"model_index\.json"):
        export_to(empty, safety, out)
    with pytest.raises(RequestError, match=r"config\.json"):
        export_to(model, empty, out)
    with pytest.raises(SafetyMismatchError, match="made for"):
        export_to(SHIPPED_MODEL, safety, out)
    with pytest.raises(OutputError, match="cannot be written"):
        export_to(model, safety, file / "bundle")
    damaged = shutil.copytree(model, tmp_path / "damaged")
    (damaged / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"cut")
    with pytest.raises(RequestError, match="damaged cannot be opened"):
        export_to(damaged, safety, out)
    assert not out.exists()


def test_weight_files_are_those_of_the_model_folder(exported: Path, folder: Path) -> None:
    stored = {
        "text_encoder": folder / "model" / "text_encoder" / "model.safetensors",
        "unet": folder / "model" / "unet" / "diffusion_pytorch_model.safetensors",
        "vae": folder / "model" / "vae" / "diffusion_pytorch_model.safetensors",
        "safety": folder / "safety" / "model.safetensors",
    }
    for name, path in stored.items():
        assert (exported / f"{name}.safetensors").read_bytes() == path.read_bytes()


def test_no_large_constant_stays_in_a_graph(exported: Path) -> None:
    for path in exported.glob("*.onnx"):
        inside = onnx.load(path, load_external_data=False).graph.initializer
        floats = [t for t in inside if t.data_type == onnx.TensorProto.FLOAT and len(t.raw_data) > 4096]
        assert not floats, f"{path.name}: {[t.name for t in floats]}"


def test_too_little_room_is_said_before_anything_is_traced(
    small: tuple[Any, SafetyModule], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    with pytest.raises(OutputError, match=r"the bundle bundle needs up to .* MB in .*, 0 MB are free"):
        export_bundle(*small, tmp_path / "bundle", BundleOptions(name="x"), pytest.fail)
    assert not any(tmp_path.iterdir())


def test_too_little_memory_is_said_before_anything_is_traced(
    small: tuple[Any, SafetyModule], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = tmp_path / "meminfo"
    said.write_text("MemTotal:       24000000 kB\nMemAvailable:        100 kB\n")
    monkeypatch.setattr("saferedir.export.room.MEMINFO", said)
    with pytest.raises(OutputError, match=r"exporting x needs about .* GB of memory"):
        export_bundle(*small, tmp_path / "bundle", BundleOptions(name="x"), pytest.fail)
