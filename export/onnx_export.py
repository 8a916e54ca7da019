"""A torch module to an ONNX graph with dynamic batch, by the current `torch.onnx` exporter, checked by onnx."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import onnx
import torch
from torch.onnx import OnnxExporterError

from saferedir.engines.errors import ExportError
from saferedir.engines.manifest import LARGEST_BATCH, TensorInfo
from saferedir.export.attention import attention_nodes, define_attention
from saferedir.export.engine_graph import Graph, StepModule
from saferedir.export.parts import called_parts, calls_for_parts, write_in
from saferedir.export.source_lines import keep_source_lines, untraceable, unwritable
from saferedir.export.static_shapes import fix_shapes

#: Every operator of this version has a CUDA kernel in ONNX Runtime, which is not so of newer ones (`capture.py`).
OPSET = 18
#: The first one whose convolutions take bf16.
BF16_OPSET = 22
#: Name of the dynamic dimension.
BATCH = "batch"
#: Of PyTorch's tracing, which raises several types of its own below the first, and of the model's own code.
TRACING_ERRORS = (RuntimeError, ValueError, TypeError, AssertionError)
DTYPES = {
    onnx.TensorProto.FLOAT: "float32",
    onnx.TensorProto.FLOAT16: "float16",
    onnx.TensorProto.INT32: "int32",
    onnx.TensorProto.INT64: "int64",
    onnx.TensorProto.BOOL: "bool",
}


def to_onnx(name: str, graphs: Mapping[str, Graph], done: dict[str, Any] | None = None, opset: int = OPSET) -> Any:
    """The graph called `name` as an `onnx.ModelProto`, first dimension dynamic and called `batch`, others as the graph says.

    Parts that it calls are written in; `done` keeps what was exported, so that each is traced once.

    Raises:
        ExportError: the model cannot be traced, or has an operator that ONNX lacks: both say at which line of its source; or
            the exporter dropped or renamed a tensor, or fixed its batch.
    """
    done = {} if done is None else done
    if name not in done:
        module = graphs[name].module
        called = {part: to_onnx(part, graphs, done, opset) for part in sorted(called_parts(module))}
        with calls_for_parts(module):
            model = _traced(name, graphs[name], opset)
        write_in(model, called)
        define_attention(model)
        fix_shapes(model)
        _check_outputs(name, graphs[name], model)
        done[name] = model
    return done[name]


def _traced(name: str, graph: Graph, opset: int) -> Any:
    return written(traced_program(name, graph, opset))


def traced_program(name: str, graph: Graph, opset: int = OPSET) -> Any:
    """The graph as PyTorch's exporter hands it over, an `onnxscript` program whose weights are the module's own tensors.

    Raises:
        ExportError: as `to_onnx`.
    """
    batch = torch.export.Dim(BATCH, max=LARGEST_BATCH)
    dims = {name: torch.export.Dim(name) for axes in graph.dynamic.values() for name in axes.values()}
    shapes = {
        key: {0: batch, **{axis: dims[name] for axis, name in graph.dynamic.get(key, {}).items()}} for key in graph.inputs
    }
    with _quiet(), torch.no_grad(), attention_nodes():
        # Exported here and not by torch.onnx.export, which falls back to a fixed batch where tracing finds a constraint.
        try:
            exported = torch.export.export(
                graph.module.eval(), tuple(graph.inputs.values()), dynamic_shapes=_of_arguments(graph, shapes), strict=False
            )
        except TRACING_ERRORS as error:
            raise ExportError(f"{name} cannot be traced: {untraceable(error)}") from error
        try:
            program = torch.onnx.export(
                exported,
                dynamic_shapes=_of_arguments(graph, shapes),
                input_names=list(graph.inputs),
                output_names=list(graph.outputs),
                opset_version=opset,
                dynamo=True,
                verbose=False,
            )
        except OnnxExporterError as error:
            raise ExportError(f"{name} cannot be written as ONNX: {unwritable(error, exported)}") from error
    if program is None:
        raise ExportError(f"{name}: the exporter returned nothing")
    return program


def written(program: Any) -> Any:
    """The program as an `onnx.ModelProto`, weights included, that says nothing of the exporting machine."""
    model = program.model_proto
    _strip_metadata(model)
    return model


def _of_arguments(graph: Graph, shapes: dict[str, Any]) -> Any:
    """Shapes by name, as the module's arguments want them: a step takes all of its tensors as one."""
    return {"tensors": tuple(shapes.values())} if isinstance(graph.module, StepModule) else shapes


def _check_outputs(name: str, graph: Graph, model: Any) -> None:
    found = [value.name for value in model.graph.output]
    if found != list(graph.outputs):
        raise ExportError(f"{name}: outputs are {found}, expected {list(graph.outputs)}")
    for info in tensor_infos([*model.graph.input, *model.graph.output]):
        if info.shape[0] != BATCH:
            raise ExportError(f"{name}: the batch of {info.name!r} became fixed at {info.shape[0]}")


def tensor_infos(values: Any) -> tuple[TensorInfo, ...]:
    """Names, types and shapes of a graph's inputs or outputs."""
    infos = []
    for value in values:
        tensor = value.type.tensor_type
        shape = tuple(dim.dim_param or dim.dim_value for dim in tensor.shape.dim)
        infos.append(TensorInfo(value.name, DTYPES[tensor.elem_type], shape))
    return tuple(infos)


def _strip_metadata(model: Any) -> None:
    """Drop stack traces and paths of the exporting machine, so that the file says only what it computes and from what."""
    model.doc_string = ""
    del model.metadata_props[:]
    del model.graph.metadata_props[:]
    del model.graph.value_info[:]
    for node in model.graph.node:
        node.doc_string = ""
    keep_source_lines(model)
    for value in [*model.graph.input, *model.graph.output, *model.graph.initializer]:
        del value.metadata_props[:]


@contextmanager
def _quiet() -> Iterator[None]:
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logger.setLevel(level)
