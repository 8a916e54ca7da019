"""Plans: really built by TensorRT-RTX without a GPU, and never taken where anything that they depend on differs."""

from __future__ import annotations

import json
import multiprocessing
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper
from typer.testing import CliRunner

from benchmarks.small_pipeline import save_small_pipeline, save_small_safety
from saferedir.engines import Bundle, open_bundle
from saferedir.engines.bundle import file_sha256
from saferedir.engines.errors import BundleError, OutputError, PlanError, RequestError
from saferedir.engines.plan_cache import FittingPlan, PlanCache, PlanKey, PlanStatus
from saferedir.engines.step import PLAIN_STEPS
from saferedir.export.plan_builder import PlanOptions, build_plans
from saferedir.runtime.command_line.app import app
from saferedir.runtime.plan_inspection import count_types
from saferedir.runtime.tensorrt import TensorRtBackend, check_profile, find_plans

KEY = PlanKey(
    engine="step", onnx_sha256="a" * 64, weights_sha256=("b" * 64,), precision="float32", builder="tensorrt-rtx",
    builder_version="1.7.1", batch=(1, 4, 8), compute_capabilities=("8.9",),
)  # fmt: skip


def write(data: bytes = b"a plan") -> Callable[[Path], Mapping[str, Any]]:
    def build(path: Path) -> Mapping[str, Any]:
        path.write_bytes(data)
        return {"seconds": 0.1}

    return build


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return open_bundle("emoji-diffusion")


def test_types_of_layers_are_counted_as_the_inspector_names_them() -> None:
    layers: list[Any] = [
        {"Name": "a", "Outputs": [{"Format/Datatype": "Row major linear FP16 format"}, {"Format/Datatype": "Half"}]},
        {"Name": "b", "Outputs": [{"Format/Datatype": "Float"}]},
        {"Name": "c", "Outputs": [{"Format/Datatype": "BFloat16"}]},
        {"Name": "d"},
        "e",
    ]
    assert count_types(layers) == {"fp16": 2, "fp32": 1, "bf16": 1, "unknown": 2}


@pytest.mark.parametrize(("parsed", "refitted"), [(False, True), (True, False)])
def test_a_plan_without_weights_that_takes_none_is_refused(bundle: Bundle, parsed: bool, refitted: bool) -> None:
    refitter = SimpleNamespace(refit_cuda_engine=lambda: refitted)
    trt = SimpleNamespace(
        Logger=type("Logger", (), {"ERROR": 0, "__init__": lambda self, _: None}),
        Refitter=lambda *_: refitter,
        OnnxParserRefitter=lambda *_: SimpleNamespace(refit_from_file=lambda graph: parsed and Path(graph).exists()),
    )
    backend = object.__new__(TensorRtBackend)
    backend._trt, backend._bundle = trt, bundle
    with pytest.raises(PlanError, match="built without weights"):
        backend._refit(FittingPlan(Path("step-0.plan"), "", {}, stripped=True), object(), "step")


@pytest.fixture
def cache(tmp_path: Path) -> PlanCache:
    return PlanCache(tmp_path / "plans")


def test_a_plan_is_built_once_and_found_again(cache: PlanCache) -> None:
    assert cache.look_up(KEY).status is PlanStatus.MISS
    path = cache.get_or_build(KEY, write())
    assert path.read_bytes() == b"a plan"
    assert cache.look_up(KEY) == replace(cache.look_up(KEY), status=PlanStatus.HIT, path=path)
    assert cache.get_or_build(KEY, pytest.fail) == path
    assert cache.details(KEY) == {"seconds": 0.1}


@pytest.mark.parametrize(
    ("change", "status", "says"),
    [
        ({"onnx_sha256": "c" * 64}, PlanStatus.STALE, "onnx_sha256 'aaa"),
        ({"weights_sha256": ("c" * 64,)}, PlanStatus.STALE, "weights_sha256"),
        ({"builder_version": "1.8.0"}, PlanStatus.STALE, "builder_version '1.7.1' instead of '1.8.0'"),
        ({"batch": (1, 8, 16)}, PlanStatus.STALE, r"batch \[1, 4, 8\] instead of \[1, 8, 16\]"),
        ({"options": (("strip_plan", "True"),)}, PlanStatus.STALE, "options"),
        ({"precision": "float16"}, PlanStatus.STALE, "precision 'float32' instead of 'float16'"),
        ({"compute_capabilities": ("12.0",)}, PlanStatus.FOREIGN, r"compute_capabilities \['8.9'\] instead of \['12.0'\]"),
        ({"builder": "tensorrt"}, PlanStatus.FOREIGN, "builder 'tensorrt-rtx' instead of 'tensorrt'"),
    ],
)
def test_another_plan_is_not_taken_and_the_difference_is_said(
    cache: PlanCache, change: dict[str, Any], status: PlanStatus, says: str
) -> None:
    first = cache.get_or_build(KEY, write())
    wanted = replace(KEY, **change)
    found = cache.look_up(wanted)
    assert (found.status, found.path) == (status, None)
    with pytest.raises(AssertionError, match=says):
        raise AssertionError(found.message)
    second = cache.get_or_build(wanted, write(b"another"))
    assert (first.read_bytes(), second.read_bytes()) == (b"a plan", b"another")


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: data[:-1] + b"?", lambda data: b""])
def test_a_damaged_plan_is_not_taken_but_built_again(cache: PlanCache, damage: Callable[[bytes], bytes]) -> None:
    path = cache.get_or_build(KEY, write())
    path.write_bytes(damage(path.read_bytes()))
    found = cache.look_up(KEY)
    assert (found.status, found.path) == (PlanStatus.DAMAGED, None)
    assert "will be built again" in found.message
    assert cache.get_or_build(KEY, write()).read_bytes() == b"a plan"
    assert cache.look_up(KEY).status is PlanStatus.HIT


def test_a_plan_under_anothers_name_is_not_taken(cache: PlanCache) -> None:
    path = cache.get_or_build(KEY, write())
    wanted = replace(KEY, onnx_sha256="c" * 64)
    for ending in (".plan", ".json"):
        path.with_suffix(ending).rename(cache.folder / f"{wanted.stem}{ending}")
    found = cache.look_up(wanted)
    assert (found.status, found.path) == (PlanStatus.DAMAGED, None)
    assert "onnx_sha256" in found.message


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 100_000, '{"key": {}}'])
def test_a_plan_without_its_statement_is_no_plan(cache: PlanCache, text: str) -> None:
    path = cache.get_or_build(KEY, write())
    path.with_suffix(".json").write_text(text)
    assert cache.look_up(KEY).status is PlanStatus.MISS
    assert cache.get_or_build(KEY, write(b"anew")).read_bytes() == b"anew"


@pytest.mark.parametrize("profiles", [None, [], {"latent": [[1]]}, {"latent": [[1], ["x"], [2]]}])
def test_a_plan_whose_statement_lacks_its_shapes_is_not_taken(bundle: Bundle, cache: PlanCache, profiles: Any) -> None:
    key = PlanKey.of(bundle, "step", builder="tensorrt-rtx", builder_version="1.7.1", batch=(1, 4, 8))
    path = cache.get_or_build(key, write())
    statement = json.loads(path.with_suffix(".json").read_text())
    path.with_suffix(".json").write_text(json.dumps(statement | {"details": {"profiles": profiles}}))
    assert "does not say which shapes" in str(cache.fitting(bundle, "step", "tensorrt-rtx", "1.7.1"))


@pytest.mark.parametrize("error", [KeyboardInterrupt, PlanError])
def test_an_interrupted_build_leaves_nothing(cache: PlanCache, error: type[BaseException]) -> None:
    def interrupted(path: Path) -> Mapping[str, Any]:
        path.write_bytes(b"half")
        raise error

    with pytest.raises(error):
        cache.get_or_build(KEY, interrupted)
    assert {path.suffix for path in cache.folder.iterdir()} == {".lock"}


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(PlanError, match="cannot hold plans"):
        PlanCache(tmp_path / "file" / "plans").get_or_build(KEY, write())


def _slowly(folder: Path, begun: Any, waited: Any) -> None:
    def build(path: Path) -> Mapping[str, Any]:
        with (folder / "builds").open("a") as file:
            file.write("x")
        begun.set()
        time.sleep(0.5)
        path.write_bytes(b"a plan")
        return {}

    PlanCache(folder).get_or_build(KEY, build, on_wait=waited.set)


def test_two_processes_build_a_plan_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    begun, waited = context.Event(), context.Event()
    first = context.Process(target=_slowly, args=(tmp_path, begun, waited))
    first.start()
    assert begun.wait(20)
    _slowly(tmp_path, begun, waited)
    first.join(20)
    assert first.exitcode == 0
    assert waited.is_set()
    assert (tmp_path / "builds").read_text() == "x"


@pytest.fixture(scope="module")
def built(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> PlanCache:
    """Portable plans of every engine of the embedded bundle."""
    cache = PlanCache(tmp_path_factory.mktemp("plans"))
    plans = build_plans(bundle, PlanOptions(), cache, tuple(bundle.manifest.engines))
    assert all(plan.built for plan in plans)
    return cache


@pytest.mark.slow
def test_every_plan_takes_and_gives_what_the_manifest_says(bundle: Bundle, built: PlanCache) -> None:
    agree(bundle, built, (1, 4, 8))


def agree(bundle: Bundle, built: PlanCache, batches: tuple[int, ...]) -> None:
    """There is a plan of every engine, and each says of itself what the manifest says."""
    statements = [json.loads(path.read_text()) for path in built.folder.glob("*.json")]
    assert {statement["key"]["engine"] for statement in statements} == set(bundle.manifest.engines)
    for statement in statements:
        engine = bundle.manifest.engines[statement["key"]["engine"]]
        tensors = statement["details"]["tensors"]
        for stated, is_input in ((engine.inputs, True), (engine.outputs, False)):
            found = [(t["name"], t["dtype"], t["shape"]) for t in tensors if t["input"] == is_input]
            assert found == [(t.name, t.dtype, [None if isinstance(size, str) else size for size in t.shape]) for t in stated]
        for tensor in engine.inputs:
            shapes = statement["details"]["profiles"][tensor.name]
            assert shapes == [[batch, *tensor.shape[1:]] for batch in batches]
        assert statement["bytes"] > 2 * bundle.manifest.files[engine.weights[0]].bytes / 3


@pytest.mark.slow
def test_what_is_there_is_not_built_again_and_builds_are_the_same(bundle: Bundle, built: PlanCache, tmp_path: Path) -> None:
    (again,) = build_plans(bundle, PlanOptions(), built, ("text_encoder",))
    assert not again.built
    (other,) = build_plans(bundle, PlanOptions(), PlanCache(tmp_path), ("text_encoder",))
    assert other.built
    assert file_sha256(other.path) == file_sha256(again.path)


@pytest.mark.slow
def test_the_runtime_finds_a_plan_whatever_it_was_built_for(bundle: Bundle, built: PlanCache) -> None:
    version = json.loads(next(built.folder.glob("step-*.json")).read_text())["key"]["builder_version"]
    found = built.fitting(bundle, "step", "tensorrt-rtx", version)
    assert not isinstance(found, str)
    (plan,) = found
    assert plan.profiles["latent"] == ((1, 4, 16, 16), (4, 4, 16, 16), (8, 4, 16, 16))
    check_profile("step", plan, {"latent": (8, 4, 16, 16)})
    with pytest.raises(RequestError, match=r"latent has the shape \[9, 4, 16, 16\].*build another with --batch 1:4:9"):
        check_profile("step", plan, {"latent": (9, 4, 16, 16)})
    other = built.fitting(bundle, "step", "tensorrt-rtx", "9.9")
    assert isinstance(other, str)
    assert f"builder_version '{version}' instead of '9.9'" in other


def test_without_a_plan_the_command_that_builds_it_is_named(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(PlanError, match=r"no plan of step for tensorrt 11\.0.*saferedir build-plans .* --target tensorrt"):
        find_plans(bundle, "step", "tensorrt", "11.0")


@pytest.mark.slow
def test_plans_for_chosen_cards_are_plans_of_their_own(bundle: Bundle, built: PlanCache) -> None:
    said: list[tuple[int, int]] = []
    options = PlanOptions(compute_capabilities=("8.9", "12.0"))
    (plan,) = build_plans(bundle, options, built, ("vae_decoder",), on_plan=lambda *at: said.append(at))
    assert plan.built
    assert "foreign" in plan.found
    assert said == [(0, 1), (1, 1)]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (PlanOptions(builder="tvm"), "target is 'tvm'"),
        (PlanOptions(batch=(4, 2, 8)), "batch is 4:2:8"),
        (PlanOptions(batch=(1, 2, 64)), "batch is 1:2:64"),
        (PlanOptions(compute_capabilities=("89",)), "compute capability is '89'"),
        (PlanOptions(builder="tensorrt", compute_capabilities=("8.9",)), "card of this machine"),
    ],
)
def test_impossible_options_are_named(bundle: Bundle, cache: PlanCache, options: PlanOptions, says: str) -> None:
    with pytest.raises(RequestError, match=says):
        build_plans(bundle, options, cache)
    assert not cache.folder.exists()


def test_an_unknown_engine_is_named(bundle: Bundle, cache: PlanCache) -> None:
    with pytest.raises(BundleError, match="no engine 'controlnet'"):
        build_plans(bundle, PlanOptions(), cache, ("controlnet",))


def test_a_card_that_the_builder_does_not_know_is_an_error(bundle: Bundle, cache: PlanCache) -> None:
    with pytest.raises(PlanError, match=r"text_encoder cannot be built by tensorrt-rtx: .*3\.0"):
        build_plans(bundle, PlanOptions(compute_capabilities=("3.0",)), cache, ("text_encoder",))
    assert {path.suffix for path in cache.folder.iterdir()} == {".lock"}


def test_an_operator_that_the_builder_lacks_is_named_with_its_node(
    bundle: Bundle, bundle_copy: Path, cache: PlanCache, rehash: Callable[[Path, str], None]
) -> None:
    tensor = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 3]) for name in ("x", "y")]
    node = helper.make_node("Strange", ["x"], ["y"], name="node_7", domain="own")
    node.metadata_props.add(key="source", value="own/strange.py:12")
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("own", 1)]
    onnx.save(helper.make_model(helper.make_graph([node], "g", tensor[:1], tensor[1:]), opset_imports=opsets),
              bundle_copy / "text_encoder.onnx")  # fmt: skip
    rehash(bundle_copy, "text_encoder.onnx")
    with pytest.raises(PlanError, match=r"node_7 and operator: Strange.*, at own/strange\.py:12$"):
        build_plans(open_bundle(bundle_copy), PlanOptions(), cache, ("text_encoder",))


def test_too_little_room_is_said_before_building(bundle: Bundle, cache: PlanCache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    with pytest.raises(OutputError, match="0 MB are free"):
        build_plans(bundle, PlanOptions(), cache, ("step",))


def test_the_command_builds_into_the_folder_named(tmp_path: Path) -> None:
    command = [
        sys.executable, "-m", "saferedir.runtime", "build-plans", "--engine", "vae_decoder", "--batch", "1:1:2",
        "--out", str(tmp_path / "p"), "--json",
    ]  # fmt: skip
    first, second = (json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout) for _ in range(2))
    assert (first[0]["built"], second[0]["built"]) == (True, False)
    assert Path(first[0]["path"]).stat().st_size == first[0]["bytes"]
    wrong = subprocess.run([*command, "--batch", "many"], capture_output=True, text=True)
    assert wrong.returncode == 2
    assert "batch is 'many'" in wrong.stderr


@pytest.mark.parametrize(
    ("target", "batch", "says"),
    [("tensorrt-rtx", "1:4:8", "expected onnx first"), ("onnx,openvino", "1:4:8", "expected one of"),
     ("onnx,tensorrt-rtx", "4:1:8", "smallest <= likeliest")],
)  # fmt: skip
def test_impossible_targets_are_named_before_anything_is_exported(tmp_path: Path, target: str, batch: str, says: str) -> None:
    command = ["export", str(tmp_path), "--safety", str(tmp_path), "--out", str(tmp_path / "bundle"), "--target", target,
               "--batch", batch]  # fmt: skip
    with pytest.raises(RequestError, match=says):
        CliRunner().invoke(app, command, catch_exceptions=False)


@pytest.mark.slow
def test_export_builds_plans_beside_the_graphs_where_they_are_asked_for(tmp_path: Path) -> None:
    model = save_small_pipeline(tmp_path / "model", width=32, heads=2)
    command = ["export", str(model), "--safety", str(save_small_safety(model, tmp_path / "safety")),
               "--out", str(tmp_path / "bundle"), "--target", "onnx,tensorrt-rtx", "--batch", "1:1:2"]  # fmt: skip
    assert CliRunner().invoke(app, command, catch_exceptions=False).exit_code == 0
    bundle = open_bundle(tmp_path / "bundle")
    for engine in (name for name in bundle.manifest.engines if name not in PLAIN_STEPS):
        (plan,) = find_plans(bundle, engine, "tensorrt-rtx", version("tensorrt-rtx"))
        assert plan.path.parent == tmp_path / "bundle" / "plans"
        assert {profile[2][0] for profile in plan.profiles.values()} == {2}
