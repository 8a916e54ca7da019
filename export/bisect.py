"""The first node of a graph whose output leaves the tolerance, against a graph that should compute the same."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
from polygraphy import constants
from polygraphy.backend.onnx import ModifyOutputs

from saferedir.export.comparison import compare
from saferedir.export.source_lines import source_line
from saferedir.runtime.installation import import_onnxruntime


@dataclass(frozen=True)
class FirstDifference:
    """Where two graphs part; `node` is None where no tensor that both name lies further apart than allowed."""

    #: Tensors that both graphs name, and how many of them were within the tolerance before the first that is not.
    tensors: int
    equal_before: int
    node: str | None = None
    operator: str | None = None
    output: str | None = None
    worst: float = 0.0
    #: Where in the model's source the node comes from.
    source: str | None = None


def first_difference(path: Path, reference: Any, given: Mapping[str, Any], allowed: float) -> FirstDifference:
    """Run the graph in `path` and the model `reference` on the inputs `given`, every tensor an output, and compare in order."""
    broken = onnx.load(str(path))
    found, expected = _all_tensors(broken, given), _all_tensors(reference, given)
    names = [output for node in broken.graph.node for output in node.output if output in found and output in expected]
    maker = {output: node for node in broken.graph.node for output in node.output}

    def at(before: int, name: str, worst: float) -> FirstDifference:
        node = maker[name]
        return FirstDifference(len(names), before, node.name, node.op_type, name, worst, source_line(broken, node.name))

    for before, name in enumerate(names):
        if found[name].shape != expected[name].shape:
            return at(before, name, float("inf"))
        if not found[name].size or found[name].dtype.kind not in "fiub":
            continue
        difference = compare({name: found[name]}, {name: expected[name]}, allowed)[name]
        if not difference.passed:
            return at(before, name, difference.worst)
    return FirstDifference(len(names), len(names))


def _all_tensors(model: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """Every tensor that the graph computes, unoptimised, by name."""
    marked = ModifyOutputs(model, outputs=constants.MARK_ALL, copy=True)()
    onnxruntime = import_onnxruntime()
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(marked.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    taken = {tensor.name for tensor in session.get_inputs()}
    return dict(zip(names, session.run(names, {name: given[name] for name in taken}), strict=True))
