"""Half precision where there is no hardware for it: fp32 arithmetic in which every half tensor is rounded.

ONNX Runtime's CPU provider computes fp16 in fp32 from one cast to the next and has no products in bf16, so what it draws says
little about a device. Here each product and sum is taken in fp32, as tensor cores do, and what a node gives is rounded to its
type before the next node sees it: overflow becomes infinity, and small differences are lost, as on the device.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from saferedir.engines import Bundle
from saferedir.engines.bundle import EngineBytes
from saferedir.engines.errors import ExportError
from saferedir.export.attention import define_attention, inlined
from saferedir.runtime.ort import OrtBackend

HALVES = (TensorProto.FLOAT16, TensorProto.BFLOAT16)
#: Operators that move numbers and make none.
MOVES = frozenset(
    (
        "Concat",
        "Expand",
        "Flatten",
        "Gather",
        "Identity",
        "Reshape",
        "Slice",
        "Split",
        "Squeeze",
        "Tile",
        "Transpose",
        "Unsqueeze",
    )
)
#: Name of the output that a watched graph has besides its own.
MAGNITUDES = "magnitudes"


class RoundedBackend(OrtBackend):
    """ONNX Runtime's CPU provider over the rounded graphs of a bundle in half precision; of one in fp32, over its own."""

    name = "rounded"

    def __init__(self, bundle: Bundle, *, exact: Collection[str] = (), threads: int | None = None) -> None:
        super().__init__(bundle, "ort-cpu", threads=threads)
        self.name = "rounded"
        self._exact = exact

    def _bytes(self, engine: str) -> EngineBytes:
        graph, weights = super()._bytes(engine)
        return EngineBytes(bytes(rounded(onnx.load_from_string(graph), exact=self._exact).SerializeToString()), weights)


def load_rounded(bundle: Bundle, engine: str, *, exact: Collection[str] = ()) -> Any:
    """The rounded graph of an engine as an `onnx.ModelProto`; its weights stay in the bundle's files."""
    return rounded(onnx.load_from_string(bundle.engine(engine).graph), exact=exact)


def rounded(model: Any, *, exact: Collection[str] = ()) -> Any:
    """`model` in fp32, every tensor that was half rounded to that type; operators of the types `exact` are not.

    Names of nodes and tensors stay, and attention is computed by ordinary operators.
    """
    model = inlined(model)
    types = tensor_types(model)
    nodes, weights = [], []
    for tensor in model.graph.initializer:
        if tensor.data_type in HALVES:
            weights.append(helper.make_node("Cast", [f"{tensor.name}.half"], [tensor.name], to=TensorProto.FLOAT))
            tensor.name = f"{tensor.name}.half"
    for node in model.graph.node:
        half = [name for name in node.output if types.get(name) in HALVES]
        if not half:
            nodes.append(node)
            continue
        if node.op_type == "Constant":
            _widen_constant(node)
            nodes.append(node)
            continue
        target = types[half[0]]
        if node.op_type == "Cast":
            nodes.append(helper.make_node("Identity", [node.input[0]], [f"{half[0]}.exact"], name=node.name)
                         if types.get(node.input[0]) in (*HALVES, TensorProto.FLOAT)
                         else helper.make_node("Cast", [node.input[0]], [f"{half[0]}.exact"], name=node.name,
                                               to=TensorProto.FLOAT))  # fmt: skip
        else:
            nodes.append(node)
            if node.op_type in MOVES or node.op_type in exact:
                continue
            for index, name in enumerate(node.output):
                if name in half:
                    node.output[index] = f"{name}.exact"
        for name in half:
            nodes.append(helper.make_node("Cast", [f"{name}.exact"], [f"{name}.rounded"], to=target))
            nodes.append(helper.make_node("Cast", [f"{name}.rounded"], [name], to=TensorProto.FLOAT))
    del model.graph.node[:]
    model.graph.node.extend([*weights, *nodes])
    del model.graph.value_info[:]
    return model


def watched(model: Any) -> tuple[Any, list[str]]:
    """A rounded graph with one more output, and its rows: the largest magnitude of each tensor before it is rounded, [R]."""
    names = [name.removesuffix(".exact") for node in model.graph.node for name in node.output if name.endswith(".exact")]
    axis = numpy_helper.from_array(np.array([0], np.int64), "magnitudes.axis")
    nodes = []
    for name in names:
        nodes.append(helper.make_node("Abs", [f"{name}.exact"], [f"{name}.abs"]))
        nodes.append(helper.make_node("ReduceMax", [f"{name}.abs"], [f"{name}.largest"], keepdims=0))
        nodes.append(helper.make_node("Unsqueeze", [f"{name}.largest", axis.name], [f"{name}.row"]))
    nodes.append(helper.make_node("Concat", [f"{name}.row" for name in names], [MAGNITUDES], axis=0))
    model.graph.node.extend(nodes)
    model.graph.initializer.append(axis)
    model.graph.output.append(helper.make_tensor_value_info(MAGNITUDES, TensorProto.FLOAT, [len(names)]))
    return model, names


def tensor_types(model: Any) -> dict[str, int]:
    """Element types of all tensors by name."""
    define_attention(model)
    weights = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    known = dict(weights)
    for node in model.graph.node:
        if node.op_type == "Cast":  # weights that are stored in another type than they are used in
            known[node.output[0]] = next(attribute.i for attribute in node.attribute if attribute.name == "to")
        if node.op_type == "GroupNormalization":  # onnx infers nothing of it; it gives what its scale is
            model.graph.value_info.append(helper.make_tensor_value_info(node.output[0], known[node.input[1]], None))
    graph = onnx.shape_inference.infer_shapes(model).graph
    types = {value.name: value.type.tensor_type.elem_type for value in (*graph.value_info, *graph.input, *graph.output)}
    if unknown := [node.name for node in graph.node if any(name and name not in types for name in node.output)]:
        raise ExportError(f"onnx infers no type for what {unknown[0]} gives; the graph cannot be rounded")
    return types | weights


def _widen_constant(node: Any) -> None:
    for attribute in node.attribute:
        if attribute.name == "value":
            array = numpy_helper.to_array(attribute.t).astype(np.float32)
            attribute.t.CopyFrom(numpy_helper.from_array(array, attribute.t.name))
