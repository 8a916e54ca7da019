"""Shapes written into a graph wherever they are known but for the batch.

PyTorch's exporter computes the shapes of many reshapes from other tensors, although only their batch can differ. ONNX Runtime
leaves such arithmetic on the host, which keeps the graph off the CUDA provider and out of a CUDA graph.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from saferedir.export.attention import is_attention

#: Constants of at most so many elements may say what a shape is; larger ones are known by their type alone.
LARGEST_SHAPE = 64
#: Operators that broadcast: a tensor without the batch gives the same with one that has it.
BROADCASTING = frozenset(("Add", "And", "Cast", "Div", "Mul", "Not", "Or", "Sub", "Where"))

Shape = list[int | None]


def fix_shapes(model: Any) -> None:
    """Give reshapes in the ONNX `model` constant shapes, and drop what only computed them.

    A reshape may leave one dimension unknown, which is the batch or a multiple of it. Constants are not repeated over the
    batch where all that is made of them broadcasts.
    """
    shapes, constants = _drop_vain_squeezes(model), _constants(model)
    varying = _varying(model)
    for node in model.graph.node:
        if node.op_type not in ("Reshape", "Expand") or node.input[1] in constants:
            continue
        shape = shapes.get(node.output[0])
        if shape is None or shape.count(None) > 1:
            continue
        if node.op_type == "Reshape":
            fixed = [-1 if size is None else size for size in shape]
        elif node.input[0] not in varying and _broadcasts(model, node.output[0], varying):
            fixed = [1 if size is None else size for size in shape]
        else:
            continue
        name = f"{node.output[0]}/shape"
        model.graph.initializer.append(numpy_helper.from_array(np.array(fixed, np.int64), name))
        node.input[1] = name
    drop_unused(model)


def _drop_vain_squeezes(model: Any) -> dict[str, Shape]:
    """Let through what PyTorch's `squeeze` lets through, a dimension other than 1, which ONNX's refuses; gives all known
    shapes, of the tensors behind as well."""
    shapes = _known_shapes(model)
    values = {own.name: own for own in model.graph.initializer if own.data_type == TensorProto.INT64}
    vain = []
    for node in model.graph.node:
        if node.op_type == "Squeeze" and len(node.input) == 2 and node.input[1] in values:
            shape = shapes.get(node.input[0])
            axes = numpy_helper.to_array(values[node.input[1]]).flatten().tolist()
            if shape is not None and all(shape[axis] not in (1, None) for axis in axes):
                vain.append(node)
    for node in vain:
        node.CopyFrom(helper.make_node("Identity", node.input[:1], list(node.output), name=node.name))
    return _known_shapes(model) if vain else shapes


def _varying(model: Any) -> set[str]:
    """Names of all tensors whose values depend on an input of the graph; that of a shape does not make one."""
    varying = {value.name for value in model.graph.input}
    for node in model.graph.node:
        read = node.input[:1] if node.op_type == "Expand" else node.input
        if node.op_type != "Shape" and varying.intersection(read):
            varying.update(node.output)
    return varying


def _broadcasts(model: Any, name: str, varying: set[str]) -> bool:
    """Whether the tensor, of constants alone, meets every varying tensor in an operator that broadcasts."""
    if name in {value.name for value in model.graph.output}:
        return False
    for node in (node for node in model.graph.node if name in node.input):
        if node.op_type not in BROADCASTING:
            return False
        if not varying.intersection(node.input) and not all(_broadcasts(model, made, varying) for made in node.output):
            return False
    return True


def drop_unused(model: Any) -> None:
    """Drop nodes and initializers that no output of the ONNX `model` depends on."""
    wanted = {value.name for value in model.graph.output}
    kept = []
    for node in reversed(model.graph.node):
        if wanted.intersection(node.output):
            wanted.update(node.input)
            kept.append(node)
    del model.graph.node[:]
    model.graph.node.extend(reversed(kept))
    initializers = [own for own in model.graph.initializer if own.name in wanted]
    del model.graph.initializer[:]
    model.graph.initializer.extend(initializers)


def _constants(model: Any) -> set[str]:
    given = {own.name for own in model.graph.initializer}
    return given | {name for node in model.graph.node if node.op_type == "Constant" for name in node.output}


def _known_shapes(model: Any) -> dict[str, Shape]:
    """Shapes of all tensors that onnx can infer, None for a dimension that it cannot."""
    inferred = onnx.shape_inference.infer_shapes(_without_weights(model), data_prop=True)
    values = (*inferred.graph.input, *inferred.graph.value_info, *inferred.graph.output)
    return {value.name: _dims(value) for value in values if value.type.tensor_type.HasField("shape")}


def _dims(value: Any) -> Shape:
    return [dim.dim_value if dim.HasField("dim_value") else None for dim in value.type.tensor_type.shape.dim]


def _without_weights(model: Any) -> Any:
    """A copy in which large constants are inputs, so that it is small whatever the model weighs."""
    light = onnx.ModelProto(ir_version=model.ir_version, opset_import=model.opset_import)
    light.graph.name = model.graph.name
    light.graph.node.extend(_of_known_shape(node) for node in model.graph.node)
    light.graph.input.extend(model.graph.input)
    light.graph.output.extend(model.graph.output)
    for own in model.graph.initializer:
        if np.prod(own.dims, dtype=np.int64) <= LARGEST_SHAPE:
            light.graph.initializer.append(own)
        else:
            light.graph.input.append(onnx.helper.make_tensor_value_info(own.name, own.data_type, list(own.dims)))
    return light


def _of_known_shape(node: Any) -> Any:
    """A copy of the node, or one that onnx infers the same shape of."""
    if is_attention(node):  # gives the shape of its query
        return helper.make_node("Identity", node.input[:1], list(node.output), name=node.name)
    return deepcopy(node)
