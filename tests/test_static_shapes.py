"""Shapes that only the batch leaves open are written into a graph, which computes the same."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from saferedir.export.static_shapes import drop_unused, fix_shapes


def model_of(*nodes: Any, result: list[int | str], **constants: Any) -> Any:
    """x [batch, 2, 6] -> y."""
    given = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 2, 6])
    made = helper.make_tensor_value_info("y", TensorProto.FLOAT, result)
    weights = [numpy_helper.from_array(np.array(value), name) for name, value in constants.items()]
    graph = helper.make_graph([*nodes], "g", [given], [made], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def run(model: Any, batch: int) -> Any:
    given = np.random.default_rng(batch).standard_normal((batch, 2, 6)).astype(np.float32)
    return onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"x": given})[0]


def operators(model: Any) -> list[str]:
    return [node.op_type for node in model.graph.node]


def attention_like() -> Any:
    """[batch, 2, 6] -> [2 batch, 6, 1], by a shape that is computed from x."""
    return model_of(
        helper.make_node("Shape", ["x"], ["last"], start=2, end=3),
        helper.make_node("Concat", ["unknown", "last", "one"], ["shape"], axis=0),
        helper.make_node("Reshape", ["x", "shape"], ["y"]),
        result=["rows", 6, 1], unknown=[-1], one=[1],
    )  # fmt: skip


def repeated(operator: str) -> Any:
    """A constant repeated over the batch, then met by x in `operator`."""
    return model_of(
        helper.make_node("Shape", ["x"], ["shape"]),
        helper.make_node("Expand", ["constant", "shape"], ["wide"]),
        helper.make_node(operator, ["wide", "x"], ["y"], **({"axis": 0} if operator == "Concat" else {})),
        result=["rows", 2, 6], constant=np.ones((1, 1, 1), np.float32),
    )  # fmt: skip


@pytest.mark.parametrize("make", [attention_like, lambda: repeated("Add"), lambda: repeated("Concat")])
@pytest.mark.parametrize("batch", [1, 3])
def test_the_graph_computes_the_same(make: Any, batch: int) -> None:
    before, after = make(), make()
    fix_shapes(after)
    assert np.array_equal(run(before, batch), run(after, batch))


def test_a_reshape_gets_a_constant_shape_and_what_computed_it_is_dropped() -> None:
    model = attention_like()
    fix_shapes(model)
    assert operators(model) == ["Reshape"]
    assert [numpy_helper.to_array(own).tolist() for own in model.graph.initializer] == [[-1, 6, 1]]


def test_a_constant_is_not_repeated_where_it_broadcasts() -> None:
    model = repeated("Add")
    fix_shapes(model)
    assert operators(model) == ["Expand", "Add"]
    assert numpy_helper.to_array(model.graph.initializer[-1]).tolist() == [1, 2, 6]


def test_a_constant_is_repeated_where_its_rows_count() -> None:
    model = repeated("Concat")
    fix_shapes(model)
    assert operators(model) == ["Shape", "Expand", "Concat"]


def test_a_shape_with_two_unknown_dimensions_is_left() -> None:
    model = model_of(
        helper.make_node("Shape", ["x"], ["batch"], start=0, end=1),
        helper.make_node("Concat", ["batch", "batch", "unknown"], ["shape"], axis=0),
        helper.make_node("Reshape", ["x", "shape"], ["y"]),
        result=["rows", "columns", "rest"], unknown=[-1],
    )  # fmt: skip
    fix_shapes(model)
    assert operators(model) == ["Shape", "Concat", "Reshape"]


def test_what_no_output_depends_on_is_dropped() -> None:
    model = model_of(
        helper.make_node("Abs", ["x"], ["y"]),
        helper.make_node("Add", ["x", "unused"], ["nowhere"]),
        result=["batch", 2, 6], unused=np.float32(1),
    )  # fmt: skip
    drop_unused(model)
    assert operators(model) == ["Abs"]
    assert list(model.graph.initializer) == []


def test_a_squeeze_of_what_is_not_1_lets_it_through_as_pytorch_does() -> None:
    model = model_of(helper.make_node("Squeeze", ["x", "axis"], ["y"]), result=["batch", 2, 6], axis=[1])
    fix_shapes(model)
    assert operators(model) == ["Identity"]
    assert run(model, 3).shape == (3, 2, 6)


def test_a_squeeze_of_1_stays() -> None:
    model = model_of(
        helper.make_node("ReduceMax", ["x", "axis"], ["one"]),
        helper.make_node("Squeeze", ["one", "axis"], ["y"]),
        result=["batch", 6], axis=[1],
    )  # fmt: skip
    fix_shapes(model)
    assert operators(model) == ["ReduceMax", "Squeeze"]
