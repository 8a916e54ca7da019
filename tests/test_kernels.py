"""The count of kernels: of graphs whose nodes are known, and of the embedded bundle."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from benchmarks.kernels import count_nodes, launching, optimised_operators
from saferedir.engines import open_bundle
from saferedir.engines.bundle import DEFAULT_BUNDLE, EngineBytes

node = helper.make_node
PLAIN = (node("Add", ["x", "stored"], ["sum"]), node("Reshape", ["sum", "shape"], ["flat"]))
SAFETY = (
    node("Sin", ["x"], ["sine"]),
    node("Add", ["constant", "constant"], ["folded"]),
    node("Greater", ["sine", "folded"], ["above"]),
    node("Where", ["above", "sine", "x"], ["chosen"]),
    node("Unsqueeze", ["chosen", "axis"], ["wide"]),
)


def engine(*nodes: Any, outputs: tuple[str, ...]) -> EngineBytes:
    """x [batch, 4], a constant of the graph and one in a file of weights."""
    stored = TensorProto(name="stored", data_type=TensorProto.FLOAT, dims=[4], data_location=TensorProto.EXTERNAL)
    for key, value in {"location": "weights.bin", "offset": "0", "length": "16"}.items():
        stored.external_data.add(key=key, value=value)
    constants = {"shape": np.array([-1]), "axis": np.array([0]), "constant": np.ones(4, np.float32)}
    graph = helper.make_graph(
        list(nodes), "step", [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [stored, *(numpy_helper.from_array(value, name) for name, value in constants.items())],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    return EngineBytes(model.SerializeToString(), {"weights.bin": np.full(4, 3, np.float32).tobytes()})


def test_what_the_safety_adds_is_counted_after_optimisation_by_operator() -> None:
    counts = count_nodes(engine(*PLAIN, *SAFETY, outputs=("flat", "wide")), engine(*PLAIN, outputs=("flat",)))
    assert counts.plain == Counter(Add=1, Reshape=1)
    assert counts.safety == Counter(Sin=1, Greater=1, Where=1, Unsqueeze=1)
    assert counts.figures() == {
        "protected": {"nodes": 6, "launching": 4},
        "plain": {"nodes": 2, "launching": 1},
        "safety": {"nodes": 4, "launching": 3},
        "safety_by_operator": {"Sin": 1, "Greater": 1, "Where": 1, "Unsqueeze": 1},
    }


def test_an_operator_of_which_the_protected_step_has_fewer_counts_against_it() -> None:
    counts = count_nodes(engine(*SAFETY, outputs=("wide",)), engine(*PLAIN, outputs=("flat",)))
    assert counts.safety["Reshape"] == counts.safety["Add"] == -1
    assert launching(counts.safety) == 3 - 1


def test_the_embedded_step_has_the_plain_ones_nodes_and_more() -> None:
    bundle = open_bundle(DEFAULT_BUNDLE)
    plain = optimised_operators(bundle.engine("plain_step_unguided"))
    protected = optimised_operators(bundle.engine("step_unguided"))
    assert launching(protected) > launching(plain) > 100
    assert plain["MultiHeadAttention"] == protected["MultiHeadAttention"] > 0
