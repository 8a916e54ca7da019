"""The safety as it is deployed: its graph decides as the controller does, alike in any company, and launches few kernels."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest
import torch
from small_module import CONCEPTS, as_usual_module

from saferedir.engines.step import NUMBERS, Form, step_inputs, step_outputs
from saferedir.export.engine_graph import EXAMPLE_BATCH, step_example, step_graph
from saferedir.export.onnx_export import to_onnx
from saferedir.export.safety_graphs import SafetyGraph

TOKENS, WIDTH, STEPS = 77, 128, 5
#: After ONNX Runtime's extended optimisation.
MOST_NODES = 200

Arrays = dict[str, npt.NDArray[Any]]
Step = Callable[[Arrays], Arrays]


@pytest.fixture(scope="module")
def graph() -> SafetyGraph:
    return SafetyGraph(as_usual_module())


@pytest.fixture(scope="module")
def exported(graph: SafetyGraph, tmp_path_factory: pytest.TempPathFactory) -> Path:
    latent, prompt = torch.randn(EXAMPLE_BATCH, 4, 16, 16), torch.randn(EXAMPLE_BATCH, TOKENS, WIDTH)
    path = tmp_path_factory.mktemp("graph") / "safety.onnx"
    onnx.save(to_onnx("safety", {"safety": step_graph(graph, step_example(latent, prompt, CONCEPTS))}), path)
    return path


def opened(path: Path, threads: int = 1, optimised: Path | None = None) -> Step:
    """The graph in ONNX Runtime."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.intra_op_num_threads = threads
    if optimised is not None:
        options.optimized_model_filepath = str(optimised)
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [own.name for own in session.get_outputs()]
    return lambda given: dict(zip(names, session.run(names, given), strict=True))


def step_of(graph: SafetyGraph) -> Step:
    """The same in PyTorch."""

    def step(given: Arrays) -> Arrays:
        with torch.no_grad():
            found = graph(*(torch.from_numpy(given[name]) for name in step_inputs(Form.SAFETY)))
        return {name: tensor.numpy() for name, tensor in zip(step_outputs(Form.SAFETY), found, strict=True)}

    return step


def run(step: Step, rows: list[int]) -> list[Arrays]:
    """What the steps of the requests `rows` give, each of which takes numbers of its own whatever stands beside it."""
    count = len(rows)

    def of_each(kind: int, *shape: int) -> npt.NDArray[np.float32]:
        return np.stack([np.random.default_rng([kind, row]).standard_normal(shape, np.float32) for row in rows])

    original = of_each(0, TOKENS, WIDTH)
    state: Arrays = {
        "prompt": original, "cooldown": np.zeros(count, np.int32), "active": np.zeros((count, CONCEPTS), bool),
        "ok": np.ones(count, bool),
    }  # fmt: skip
    constant: Arrays = {
        "original": original, "negative": of_each(1, TOKENS, WIDTH), "period": np.array([row % 2 for row in rows], np.int32),
        "threshold": np.full((count, CONCEPTS), 0.5, np.float32),
    }  # fmt: skip
    taken = []
    for index in range(STEPS):
        numbers = dict.fromkeys(NUMBERS, 0.0) | {"noise_share": 0.9 - index / STEPS, "known": float(index > 0)}
        values = [[*(numbers | {"amplification": row % 3 / 2}).values()] for row in rows]
        own: Arrays = {
            "latent": of_each(10 + index, 4, 16, 16), "denoised": of_each(20 + index, 4, 16, 16),
            "numbers": np.array(values, np.float32),
        }  # fmt: skip
        taken.append(step(own | constant | state))
        state = {name: taken[-1][f"next_{name}"] for name in state}
    return taken


def test_the_graph_decides_as_the_controller_does(graph: SafetyGraph, exported: Path) -> None:
    rows = list(range(6))
    fired = []
    for found, expected in zip(run(opened(exported), rows), run(step_of(graph), rows), strict=True):
        assert found.keys() == expected.keys()
        for name, values in expected.items():
            np.testing.assert_allclose(found[name], values, rtol=1e-3, atol=1e-4, err_msg=name)
        fired.append(found["fired"])
    assert np.any(fired)
    assert not np.all(fired)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("company", [[3, 0], [0, 3], [1, 3, 2], [7, 6, 5, 4, 3, 2, 1, 0]])
def test_a_request_alone_equals_the_same_in_company_to_the_bit(exported: Path, company: list[int], threads: int) -> None:
    step, row = opened(exported, threads), company.index(3)
    fired = 0
    for alone, together in zip(run(step, [3]), run(step, company), strict=True):
        for name, values in alone.items():
            assert values[0].tobytes() == together[name][row].tobytes(), name
        fired += int(alone["fired"].sum())
    assert fired


@pytest.mark.parametrize("name", ["latent", "denoised", "prompt", "original", "negative"])
def test_what_is_not_finite_stays_with_its_request(exported: Path, name: str) -> None:
    step = opened(exported)

    def spoilt(given: Arrays) -> Arrays:
        values = given[name].copy()
        values[1].flat[0] = np.nan
        return step(given | {name: values, "threshold": np.zeros_like(given["threshold"])})

    def clean(given: Arrays) -> Arrays:
        return step(given | {"threshold": np.zeros_like(given["threshold"])})

    (found, *_), (expected, *_) = run(spoilt, [0, 1, 2]), run(clean, [0, 1, 2])
    assert expected["next_ok"].tolist() == [True, True, True]
    assert found["next_ok"].tolist() == [True, False, True]
    for output, values in expected.items():
        assert np.array_equal(found[output][[0, 2]], values[[0, 2]]), output


def test_it_launches_few_kernels(exported: Path, tmp_path: Path) -> None:
    opened(exported, optimised=tmp_path / "optimised.onnx")
    nodes = onnx.load(tmp_path / "optimised.onnx").graph.node
    assert 50 < len(nodes) <= MOST_NODES
