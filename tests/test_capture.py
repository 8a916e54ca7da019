"""Nothing in an engine ends its capture in a CUDA graph; what would is found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

from saferedir.engines import open_bundle
from saferedir.engines.bundle import DEFAULT_BUNDLE
from saferedir.export.capture import capture_obstacles

BUNDLE = open_bundle(DEFAULT_BUNDLE)


@pytest.mark.parametrize("engine", sorted(BUNDLE.manifest.engines))
def test_no_engine_of_the_embedded_bundle_has_an_obstacle(engine: str) -> None:
    assert capture_obstacles(BUNDLE.engine_path(engine)) == []


def saved(folder: Path, *nodes: Any, opset: int = 18, kind: int = TensorProto.FLOAT, result: int | None = None) -> Path:
    """x [batch, 3] -> y."""
    given = helper.make_tensor_value_info("x", kind, ["batch", 3])
    made = helper.make_tensor_value_info("y", kind if result is None else result, None)
    axes = helper.make_tensor("axes", TensorProto.INT64, [1], [1])
    graph = helper.make_graph([*nodes], "g", [given], [made], [axes])
    path = folder / "graph.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10), str(path))
    return path


def branch(name: str) -> Any:
    node = helper.make_node("Add" if name == "then" else "Mul", ["x", "x"], [name])
    return helper.make_graph([node], name, [], [helper.make_tensor_value_info(name, TensorProto.FLOAT, None)])


def test_control_flow_is_found(tmp_path: Path) -> None:
    path = saved(
        tmp_path,
        helper.make_node("ReduceSum", ["x"], ["sum"], keepdims=0),
        helper.make_node("Cast", ["sum"], ["condition"], to=TensorProto.BOOL),
        helper.make_node("If", ["condition"], ["y"], name="branching", then_branch=branch("then"), else_branch=branch("else")),
    )
    assert ("branching", "control flow") in {(found.node, found.reason) for found in capture_obstacles(path)}


def test_a_shape_that_depends_on_data_is_found(tmp_path: Path) -> None:
    path = saved(tmp_path, helper.make_node("NonZero", ["x"], ["y"], name="where"), result=TensorProto.INT64)
    assert [found.reason for found in capture_obstacles(path)] == ["the shape of its result depends on data"]


@pytest.mark.parametrize(("opset", "obstacles"), [(18, 0), (20, 1)])
def test_a_newer_version_without_a_kernel_is_found(tmp_path: Path, opset: int, obstacles: int) -> None:
    path = saved(tmp_path, helper.make_node("ReduceMax", ["x", "axes"], ["y"], name="largest"), opset=opset)
    found = capture_obstacles(path)
    assert len(found) == obstacles
    assert all((one.node, one.reason) == ("largest", "no CUDA kernel for version 20 and float") for one in found)


def test_a_type_without_a_kernel_is_found(tmp_path: Path) -> None:
    nodes = (helper.make_node("Cast", ["x"], ["c"], to=TensorProto.BOOL), helper.make_node("Where", ["c", "x", "x"], ["y"]))
    assert [found.operator for found in capture_obstacles(saved(tmp_path, *nodes, kind=TensorProto.INT8))] == [
        "Cast",
        "Where",
    ]


def test_arithmetic_on_a_shape_is_found(tmp_path: Path) -> None:
    path = saved(
        tmp_path,
        helper.make_node("Shape", ["x"], ["shape"]),
        helper.make_node("Concat", ["axes", "shape"], ["longer"], name="host", axis=0),
        helper.make_node("Expand", ["x", "longer"], ["y"]),
    )
    assert [(found.node, found.reason) for found in capture_obstacles(path)] == [("host", "computes with a shape, on the host")]


def test_a_shape_may_be_handed_on_as_it_is(tmp_path: Path) -> None:
    path = saved(
        tmp_path,
        helper.make_node("Shape", ["x"], ["shape"]),
        helper.make_node("Expand", ["x", "shape"], ["y"]),
    )
    assert capture_obstacles(path) == []
