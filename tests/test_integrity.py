"""The bytes that are used are the bytes that were hashed, and what an engine does not say is never taken for a yes."""

from __future__ import annotations

import os
import random
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from tiny_bundle import FACTOR, VALUES, stored, write_tiny_bundle
from typer.testing import CliRunner

from saferedir.engines import Bundle, open_bundle
from saferedir.engines.bundle import DIGEST_VARIABLE, file_sha256
from saferedir.engines.errors import (
    BundleAlteredError,
    BundleError,
    BundleMissingFileError,
    NonFiniteError,
    PlanError,
    RequestError,
    SafeRedirError,
)
from saferedir.engines.manifest import MANIFEST_FILE
from saferedir.engines.onnx_file import check_external_data
from saferedir.engines.plan_cache import FittingPlan
from saferedir.engines.step import Form, Role, step_tensors
from saferedir.export.engine_graph import step_example
from saferedir.runtime import Pipeline
from saferedir.runtime.backend import BackendAround, Call, Tensors
from saferedir.runtime.command_line.app import app
from saferedir.runtime.ort import OrtBackend

STEPS = 3
Rehash = Callable[[Path, str], None]
Edit = Callable[[Path, Callable[[dict[str, Any]], None]], None]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_tiny_bundle(tmp_path / "tiny")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One that no test changes."""
    return write_tiny_bundle(tmp_path_factory.mktemp("bundle") / "tiny")


def draw(place: Path | Bundle, backend: Any = None) -> bytes:
    bundle = place if isinstance(place, Bundle) else open_bundle(place)
    pipeline = Pipeline(bundle, backend or OrtBackend(bundle, "ort-cpu", threads=1))
    return pipeline("a church", seed=1, num_inference_steps=STEPS).images[0].tobytes()


def zeros(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


@pytest.mark.parametrize("name", ["unet.safetensors", "vae.safetensors", "step.onnx", "text_encoder.onnx", "tokenizer.json"])
@pytest.mark.parametrize("damage", [zeros, lambda path: path.write_bytes(path.read_bytes()[:-1]), Path.unlink])
def test_a_file_that_is_changed_after_opening_gives_no_picture(folder: Path, name: str, damage: Callable[[Path], Any]) -> None:
    bundle = open_bundle(folder)
    damage(folder / name)
    with pytest.raises((BundleAlteredError, BundleMissingFileError), match=name.replace(".", r"\.")):
        draw(bundle)


def test_a_manifest_that_is_changed_after_opening_changes_nothing(folder: Path) -> None:
    expected, bundle = draw(folder), open_bundle(folder)
    (folder / MANIFEST_FILE).write_text("{}")
    assert draw(bundle) == expected


def test_at_any_moment_a_changed_file_gives_a_typed_error_or_the_original_picture(tiny: Path, tmp_path: Path) -> None:
    expected, rng = draw(tiny), random.Random(0)
    started = time.perf_counter()
    draw(tiny)
    takes, outcomes = time.perf_counter() - started, {"picture": 0, "error": 0}
    other = write_tiny_bundle(tmp_path / "other")
    for path in other.glob("*.safetensors"):
        path.write_bytes(np.full(VALUES, -FACTOR, np.float32).tobytes())
    names = sorted(path.name for path in tiny.iterdir())
    for moment in range(100):
        place = Path(shutil.copytree(tiny, tmp_path / str(moment)))
        path = place / rng.choice(names)
        damage: Callable[[Path], Any] = rng.choice(
            [
                zeros,
                Path.unlink,
                lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
                lambda path: os.replace(shutil.copy(other / path.name, path.with_suffix(".new")), path),
                lambda path: path.write_bytes((other / path.name).read_bytes()),
                lambda path: os.replace(shutil.copy(tiny / "step.onnx", path.with_suffix(".new")), path),
            ]
        )
        thread = threading.Timer(rng.uniform(0, takes), lambda path=path, damage=damage: damage(path))  # type: ignore[misc]
        thread.start()
        try:
            assert draw(place) == expected
            outcomes["picture"] += 1
        except SafeRedirError:
            outcomes["error"] += 1
        thread.join()
        shutil.rmtree(place)
    assert min(outcomes.values()) >= 10, outcomes


@pytest.mark.parametrize("where", ["inputs", "outputs"])
@pytest.mark.parametrize("engine", ["step", "step_unguided", "plain_step", "text_encoder", "vae_decoder"])
def test_engines_that_do_not_state_exactly_their_tensors_are_refused(
    folder: Path, edit_manifest: Edit, engine: str, where: str
) -> None:
    tensors: Callable[[dict[str, Any]], list[dict[str, Any]]] = lambda raw: raw["engines"][engine][where]  # noqa: E731
    changes: tuple[Callable[[dict[str, Any]], Any], ...] = (
        lambda raw: tensors(raw).pop(),
        lambda raw: tensors(raw).append({"name": "more", "dtype": "float32", "shape": ["batch"]}),
        lambda raw: tensors(raw)[0].update(name="another"),
        lambda raw: tensors(raw)[0].update(dtype="float16"),
        lambda raw: tensors(raw)[0].update(shape=["batch", 7]),
    )
    original = (folder / MANIFEST_FILE).read_bytes()
    for change in changes:
        (folder / MANIFEST_FILE).write_bytes(original)
        edit_manifest(folder, change)
        with pytest.raises(BundleAlteredError, match=rf"{where} of engine '{engine}'.*is stated where .* is expected"):
            open_bundle(folder)


def test_an_engine_that_no_picture_is_drawn_with_is_refused(folder: Path, edit_manifest: Edit) -> None:
    edit_manifest(folder, lambda raw: raw["engines"].update(unet=raw["engines"]["step"]))
    with pytest.raises(BundleAlteredError, match="engine 'unet' is not one that is drawn with"):
        open_bundle(folder)


@pytest.mark.parametrize("output", ["next_ok", "next_latent", "score", "token_mask"])
def test_a_graph_without_an_output_that_the_manifest_states_is_refused(folder: Path, rehash: Rehash, output: str) -> None:
    model = onnx.load(str(folder / "step.onnx"), load_external_data=False)
    left = [value for value in model.graph.output if value.name != output]
    del model.graph.output[:]
    model.graph.output.extend(left)
    (folder / "step.onnx").write_bytes(model.SerializeToString())
    rehash(folder, "step.onnx")
    with pytest.raises(BundleAlteredError, match=r"step\.onnx: outputs"):
        draw(folder)


def test_a_graph_whose_tensors_are_named_otherwise_is_refused_although_the_manifest_agrees(
    folder: Path, rehash: Rehash, edit_manifest: Edit
) -> None:
    model = onnx.load(str(folder / "step.onnx"), load_external_data=False)
    next(value for value in model.graph.output if value.name == "next_ok").name = "next_active"
    (folder / "step.onnx").write_bytes(model.SerializeToString())
    rehash(folder, "step.onnx")
    edit_manifest(folder, lambda raw: raw["engines"]["step"]["outputs"][5].update(name="next_active"))
    with pytest.raises(BundleAlteredError, match=r"next_active bool .* is stated where next_ok bool"):
        open_bundle(folder)


class Lazy(BackendAround):
    """Leaves out some calls of steps, or what they say of one output."""

    def __init__(self, backend: OrtBackend, skipped: Callable[[int], bool], output: str | None = None) -> None:
        super().__init__(backend)
        self.skipped, self.output, self.step = skipped, output, 0

    def bind(self, engine: str, inputs: Tensors, outputs: Tensors, rows: int | None = None) -> Call:
        call = self.backend.bind(engine, inputs, outputs, rows)
        if not engine.startswith("step"):
            return call
        elsewhere = (
            {**outputs, self.output: self.backend.upload(self.backend.read(outputs[self.output]))} if self.output else {}
        )
        silent = self.backend.bind(engine, inputs, elsewhere, rows) if self.output else lambda: None

        def lazy() -> None:
            step, self.step = self.step, self.step + 1
            (silent if self.skipped(step) else call)()

        return lazy


@pytest.mark.parametrize("skipped", [range(STEPS), (0,), (1,), (STEPS - 1,)], ids=["every", "first", "middle", "last"])
@pytest.mark.parametrize("output", [None, "next_ok"], ids=["nothing", "all but ok"])
def test_a_step_that_does_not_say_that_it_is_sound_gives_no_picture(tiny: Path, skipped: Any, output: str | None) -> None:
    backend = OrtBackend(open_bundle(tiny), "ort-cpu", threads=1)
    assert draw(open_bundle(tiny), Lazy(backend, lambda _: False)) == draw(tiny)
    with pytest.raises(NonFiniteError, match="no picture"):
        draw(open_bundle(tiny), Lazy(backend, lambda step: step in skipped, output))


def test_a_link_that_leads_out_of_the_bundle_is_refused_and_one_within_it_is_not(folder: Path, tmp_path: Path) -> None:
    shutil.move(folder / "unet.safetensors", folder / "weights")
    (folder / "unet.safetensors").symlink_to("weights")
    assert open_bundle(folder)
    shutil.move(folder / "weights", tmp_path / "weights")
    (folder / "unet.safetensors").unlink()
    (folder / "unet.safetensors").symlink_to(tmp_path / "weights")
    with pytest.raises(BundleAlteredError, match=r"unet\.safetensors leads out of the bundle"):
        open_bundle(folder)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes here")
def test_a_pipe_or_folder_in_a_files_place_is_refused_at_once(folder: Path) -> None:
    (folder / "vae.safetensors").unlink()
    os.mkfifo(folder / "vae.safetensors")
    with pytest.raises(BundleAlteredError, match=r"vae\.safetensors is no regular file"):
        open_bundle(folder)
    (folder / "vae.safetensors").unlink()
    (folder / "vae.safetensors").mkdir()
    with pytest.raises(BundleError, match=r"vae\.safetensors"):
        open_bundle(folder)


@pytest.mark.parametrize("location", ["../x", "x", "/etc/hostname", "./unet.safetensors", "vae.safetensors", ""])
def test_weights_that_the_manifest_does_not_list_for_an_engine_are_not_read(
    folder: Path, rehash: Rehash, monkeypatch: pytest.MonkeyPatch, location: str
) -> None:
    for place in (folder / "x", folder.parent / "x"):
        place.write_bytes(np.full(VALUES, 2, np.float32).tobytes())
    monkeypatch.chdir(folder)
    model = onnx.load(str(folder / "step.onnx"), load_external_data=False)
    tensor = next(own for own in model.graph.initializer if own.name == "stored")
    next(entry for entry in tensor.external_data if entry.key == "location").value = location
    (folder / "step.onnx").write_bytes(model.SerializeToString())
    rehash(folder, "step.onnx")
    with pytest.raises(BundleAlteredError, match=r"step\.onnx reads .*, which the manifest does not list for it"):
        draw(folder)


def hidden(way: str) -> bytes:
    """A graph that reads the file `x` elsewhere than among its own initializers."""
    value = helper.make_tensor_value_info("y", TensorProto.FLOAT, [VALUES])
    inner = helper.make_graph([helper.make_node("Identity", ["stored"], ["y"])], "inner", [], [value], [stored("x")])
    nodes: list[Any] = []
    if way == "subgraph":
        nodes = [helper.make_node("If", ["c"], ["y"], then_branch=inner, else_branch=inner)]
    elif way == "attribute":
        nodes = [helper.make_node("Constant", [], ["y"], value=stored("x"))]
    elif way == "attributes":
        nodes = [helper.make_node("Own", [], ["y"], many=[stored("x")])]
    made = helper.make_graph(nodes, "g", [], [value])
    if way == "sparse":
        made.sparse_initializer.append(onnx.SparseTensorProto(values=stored("x")))
    model = helper.make_model(made)
    if way == "function":
        node = helper.make_node("Constant", [], ["y"], value=stored("x"))
        model.functions.append(helper.make_function("own", "F", [], ["y"], [node], [helper.make_opsetid("", 18)]))
    return bytes(model.SerializeToString())


@pytest.mark.parametrize("way", ["subgraph", "attribute", "attributes", "sparse", "function"])
def test_weights_are_read_nowhere_but_among_a_graphs_own_initializers(way: str) -> None:
    with pytest.raises(BundleAlteredError, match="'x'"):
        check_external_data(hidden(way), ["x"], "g.onnx")


def test_bytes_that_are_no_graph_are_typed_errors(tiny: Path) -> None:
    data, rng = (tiny / "step.onnx").read_bytes(), random.Random(0)
    check_external_data(data, ["unet.safetensors"], "step.onnx")
    for _ in range(300):
        damaged = bytearray(data[: rng.randrange(len(data))] if rng.random() < 0.5 else data)
        for _ in range(rng.randrange(1, 9)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256) if damaged else 0
        try:
            check_external_data(bytes(damaged), ["unet.safetensors"], "step.onnx")
        except BundleAlteredError as error:
            assert str(error).startswith("step.onnx")


def test_a_pinned_bundle_is_opened_and_another_is_refused(
    folder: Path, edit_manifest: Edit, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = file_sha256(folder / MANIFEST_FILE)
    assert open_bundle(folder, digest=digest.upper()).digest == digest
    monkeypatch.setenv(DIGEST_VARIABLE, digest)
    assert Pipeline.from_bundle(folder, backend="ort-cpu").bundle.digest == digest
    edit_manifest(folder, lambda raw: raw["safety"]["concepts"][0].update(threshold=1.0))
    changed = file_sha256(folder / MANIFEST_FILE)
    for given in (None, digest):
        with pytest.raises(BundleAlteredError, match=f"{changed}, pinned is {digest}"):
            open_bundle(folder, digest=given)
    assert open_bundle(folder, digest=changed)
    with pytest.raises(RequestError, match="digest is 'abc'; expected the 64 hexadecimal digits"):
        open_bundle(folder, digest="abc")


def test_the_command_line_prints_the_digest_and_opens_no_other_bundle(tiny: Path, tmp_path: Path) -> None:
    digest, runner = file_sha256(tiny / MANIFEST_FILE), CliRunner()
    assert f"digest {digest}" in runner.invoke(app, ["inspect", str(tiny)]).output
    for command in (["generate", "a cat", "--steps", "1", "--out", str(tmp_path / "drawn"), "--bundle"], ["inspect"]):
        assert runner.invoke(app, [*command, str(tiny), "--bundle-digest", digest]).exit_code == 0
        for refused in (
            runner.invoke(app, [*command, str(tiny), "--bundle-digest", "0" * 64]),
            runner.invoke(app, [*command, str(tiny)], env={DIGEST_VARIABLE: "0" * 64}),
        ):
            assert isinstance(refused.exception, BundleAlteredError)
            assert f"{digest}, pinned is {'0' * 64}" in str(refused.exception)
    assert len(list((tmp_path / "drawn").iterdir())) == 1


def test_a_record_names_graphs_weights_and_manifest(tiny: Path) -> None:
    versions = Pipeline.from_bundle(tiny, backend="ort-cpu")("a", num_inference_steps=1).records[0].versions
    for path in tiny.iterdir():
        assert versions[f"{path.name} sha256"] == file_sha256(path)


def test_a_plan_that_was_swapped_after_it_was_found_is_not_deserialised(tmp_path: Path) -> None:
    path = tmp_path / "step-0.plan"
    path.write_bytes(b"a plan")
    plan = FittingPlan(path, file_sha256(path), {})
    assert plan.read() == b"a plan"
    path.write_bytes(b"b plan")
    with pytest.raises(PlanError, match="does not have the hash"):
        plan.read()
    path.unlink()
    with pytest.raises(PlanError, match="cannot be read"):
        plan.read()


def test_what_a_builder_is_given_is_what_was_hashed(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "copy").mkdir()
    copied = open_bundle(folder).copy_engine("step", tmp_path / "copy")
    assert {path.name: path.read_bytes() for path in copied.parent.iterdir()} == {
        name: (folder / name).read_bytes() for name in ("step.onnx", "unet.safetensors")
    }
    bundle = open_bundle(folder)
    zeros(folder / "unet.safetensors")
    with pytest.raises(BundleAlteredError, match=r"unet\.safetensors"):
        bundle.copy_engine("step", tmp_path / "copy")


@pytest.mark.parametrize("form", [*Form])
def test_every_form_of_a_step_has_an_example_of_each_tensor_and_names_none_twice(form: Form) -> None:
    import torch

    example = step_example(torch.zeros(2, 4, 8, 8), torch.zeros(2, 77, 16), 3)
    sizes = {"batch": 2, "channels": 4, "height": 8, "width": 8, "tokens": 77, "prompt width": 16, "concepts": 3}
    tensors = step_tensors(form)
    assert len({tensor.name for tensor in tensors}) == len({tensor.output for tensor in tensors}) == len(tensors)
    for tensor in tensors:
        if tensor.role is not Role.RECORD:
            shape = [sizes.get(size, size) for size in tensor.shape]  # type: ignore[arg-type]
            assert list(example[tensor.name].shape) == shape
            assert str(example[tensor.name].dtype) == f"torch.{tensor.dtype}"
