"""The benchmark of a step on a GPU: its parts, the whole of it dry on the CPU, and the real command where there is a card."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import benchmark as course
from benchmarks.gpu.benchmark import COMPILED, CONTESTANTS, EAGER, RUNTIME, Benchmark, Plan
from benchmarks.gpu.contestants import Pair
from benchmarks.gpu.graphs import parts_of, step_graphs
from benchmarks.gpu.packed import SMALLEST, Packed
from benchmarks.gpu.report import Row, with_ratios
from benchmarks.gpu.shapes import Shape, shapes
from benchmarks.gpu.timing import Effort, Times, measure
from saferedir.export.capture import capture_obstacles
from saferedir.export.engine_graph import graph
from saferedir.runtime.ort import give_weights

CPU = torch.device("cpu")
FIGURES = {"steps", "protected_ms", "protected_quartiles_ms", "plain_ms", "plain_quartiles_ms", "safety_ms", "safety_percent"}


class Network(nn.Module):
    """A layer of each kind whose weights graphs hold in a way of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.multiplied, self.added = nn.Linear(128, 96, bias=False), nn.Linear(96, 128)
        self.convolved = nn.Conv1d(8, 160, 3, padding=1)

    def forward(self, given: Tensor) -> Tensor:
        known: Tensor = self.added(self.multiplied(given)[:, 0])
        seen: Tensor = self.convolved(given).mean(1) + known
        return seen


@pytest.fixture(scope="module")
def packed() -> Packed:
    with torch.device("meta"):
        network = Network().eval()
    return Packed("weights", network)


def test_a_graph_traced_before_its_weights_exist_computes_with_them(packed: Packed) -> None:
    given = torch.randn(3, 8, 128)
    model = packed.trace("network", graph(packed.network, {"given": given[:2]}, ("seen",)))
    packed.fill(CPU)
    options = onnxruntime.SessionOptions()
    give_weights(options, {"weights": packed.buffer.tobytes()})
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    (seen,) = session.run(None, {"given": given.numpy()})
    with torch.no_grad():
        expected = packed.network(given).numpy()
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(seen, expected, atol=1e-4)
    inside = [tensor for tensor in model.graph.initializer if tensor.data_location != onnx.TensorProto.EXTERNAL]
    assert all(np.prod(tensor.dims) <= SMALLEST for tensor in inside)


def test_both_kinds_of_a_step_take_turns_and_the_first_of_a_turn_is_not_counted() -> None:
    said: list[str] = []
    pair = Pair(lambda: said.append("protected"), lambda: said.append("plain"), lambda: np.zeros(0, np.float32))
    times = measure(pair, CPU, Effort(steps=10, seconds=60, warm_up=2))
    assert said == ["protected"] * 2 + ["plain"] * 2 + (["protected"] * 6 + ["plain"] * 6) * 2
    assert len(times.protected) == len(times.plain) == 10
    once = measure(pair, CPU, Effort(steps=10, seconds=0))
    assert len(once.plain) == 5


def test_figures_are_medians_and_what_the_safety_adds() -> None:
    assert Times([5.0, 3.0, 4.0, 90.0, 4.0], [2.0, 2.0, 1.0, 8.0, 3.0]).figures() == {
        "steps": 5,
        "protected_ms": 4.0,
        "protected_quartiles_ms": [4.0, 5.0],
        "plain_ms": 2.0,
        "plain_quartiles_ms": [2.0, 3.0],
        "safety_ms": 2.0,
        "safety_percent": 100.0,
    }


def test_other_contestants_are_compared_with_ours_of_the_same_batch() -> None:
    rows = [
        Row("m", RUNTIME, 1, {"protected_ms": 2.0}),
        Row("m", RUNTIME, 4, {"error": "out of memory"}),
        Row("m", EAGER, 1, {"protected_ms": 5.0}),
        Row("m", EAGER, 4, {"protected_ms": 9.0}),
    ]
    saved = with_ratios(rows, RUNTIME, (EAGER, COMPILED))
    assert [row.get("ours_is_faster_by") for row in saved] == [None, None, 2.5, None]


def dry(seconds: float, folder: Path) -> Benchmark:
    return Benchmark(Plan("cpu", "ort-cpu", (1, 2), Effort(2, 5, 1)), folder, seconds, tiny=True)


def test_a_contestant_that_fails_leaves_a_row_that_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("CUDA out of memory\nby much")

    benchmark = dry(60, tmp_path)
    monkeypatch.setattr(Benchmark, "_contestant", broken)
    opened = course.subject("embedded", CPU, tmp_path, tiny=True)
    assert benchmark._measured(opened, EAGER) == [
        Row("embedded", EAGER, batch, {"error": "CUDA out of memory"}) for batch in (1, 2)
    ]


def test_what_does_not_fit_into_the_time_is_left_out_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Benchmark, "_measured", lambda self, opened, contestant: [Row(opened.name, contestant, 1, {})])
    benchmark = dry(0, tmp_path)
    assert len(list(benchmark.run(["embedded"]))) == 3
    left_out = {"left_out": "no time left"}
    assert benchmark._rows == [
        Row("embedded", RUNTIME, 1, {}), Row("embedded", EAGER, 1, {}),
        Row("embedded", COMPILED, 1, left_out), Row("embedded", COMPILED, 2, left_out),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder where each graph is traced once."""
    return tmp_path_factory.mktemp("graphs")


@pytest.fixture(scope="module")
def figures(graphs: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the dry run of the whole command writes."""
    folder = tmp_path_factory.mktemp("dry")
    with pytest.MonkeyPatch.context() as patch:
        options = ["--dry-run", "--out", str(folder), "--graphs", str(graphs), "--minutes", "60"]
        patch.setattr(sys, "argv", ["gpu", *options])
        command.main()
    found: dict[str, Any] = json.loads((folder / "gpu.json").read_text())
    return found


@pytest.mark.slow
@pytest.mark.parametrize("shape", shapes(tiny=True), ids=lambda shape: shape.name)
def test_nothing_in_a_step_ends_its_capture(shape: Shape, graphs: Path, tmp_path: Path) -> None:
    parts = parts_of(shape)
    parts.unet.fill(CPU)
    for file, buffer in parts.weights().items():
        buffer.tofile(tmp_path / file)
    for steps in step_graphs(parts, graphs).values():
        for step, data in steps.items():
            path = tmp_path / f"{step}.onnx"
            path.write_bytes(data)
            assert capture_obstacles(path) == []


@pytest.mark.slow
def test_the_dry_run_goes_the_whole_way_and_says_that_it_measures_nothing(figures: dict[str, Any]) -> None:
    assert figures["dry_run"] is True
    assert figures["times_mean"].startswith("nothing")
    check(figures, batches=(1, 2))


@pytest.mark.slow
def test_every_contestant_computes_the_same_step(figures: dict[str, Any]) -> None:
    differences = {(row["model"], row["contestant"]): row["differs_by"] for row in figures["rows"] if "differs_by" in row}
    assert {contestant for _, contestant in differences} == {RUNTIME, EAGER, COMPILED}
    assert all(value < (1e-4 if model == "embedded" else 2e-2) for (model, _), value in differences.items())


def check(figures: dict[str, Any], batches: tuple[int, ...]) -> None:
    """Every model, contestant and batch has its figures."""
    assert figures["environment"]["packages"]["torch"]
    expected = {
        (model, contestant, batch)
        for model in figures["models"]
        for contestant in CONTESTANTS
        for batch in batches
        if (model, contestant) != ("embedded", "safety alone")
    }
    assert {(row["model"], row["contestant"], row["batch"]) for row in figures["rows"]} == expected
    for row in figures["rows"]:
        assert FIGURES - {"safety_percent"} <= row.keys(), row
        assert ("ours_is_faster_by" in row) == (row["contestant"] in (EAGER, COMPILED))
        assert row["safety_ms"] == row["protected_ms"] - row["plain_ms"]
    for model in figures["models"].values():
        assert model["kernels"]["safety"]["launching"] > 0
        assert model["safety_parameters"] > 0


@pytest.mark.gpu
def test_the_command_measures_on_a_card(tmp_path: Path) -> None:
    options = ["--models", "embedded", "--minutes", "3", "--out", str(tmp_path)]
    subprocess.run([sys.executable, "-m", "benchmarks.gpu", *options], check=True)
    figures = json.loads((tmp_path / "gpu.json").read_text())
    assert figures["dry_run"] is False
    assert figures["device"]["name"] == torch.cuda.get_device_name()
    check(figures, batches=(1, 4, 16))
    assert all(row["steps"] >= 50 and row["differs_by"] < 1e-2 for row in figures["rows"])
