"""Where in the model's source each node of a graph comes from: kept in the node, for messages that name it.

A position is `package/module.py:line`, the same on every machine that has the same versions of the packages.
"""

from __future__ import annotations

import re
import traceback
from pathlib import Path
from typing import Any

import onnx
import torch

#: Of a node's metadata.
KEY = "source"
#: What PyTorch's exporter keeps of where a node was traced.
TRACE = "pkg.torch.onnx.stack_trace"
FRAME = re.compile(r'File "([^"]+)", line (\d+)')


def keep_source_lines(model: Any) -> None:
    """Put the position that each node of the freshly traced ONNX `model` comes from in place of its other metadata."""
    for node in model.graph.node:
        traced = "".join(own.value for own in node.metadata_props if own.key == TRACE)
        del node.metadata_props[:]
        if position := position_in(traced):
            node.metadata_props.add(key=KEY, value=position)


def position_in(trace: str) -> str | None:
    """The innermost position of a stack trace outside of PyTorch's own layers, or the innermost of all."""
    frames = [(Path(file), line) for file, line in FRAME.findall(trace)]
    own = [(file, line) for file, line in frames if "torch" not in _in_package(file).parts[:1]]
    return next((f"{_in_package(file).as_posix()}:{line}" for file, line in reversed(own or frames)), None)


def source_line(model: Any, node_name: str) -> str | None:
    """The position that the node of that name comes from, if the graph says so; `model` is a graph or its file."""
    if isinstance(model, Path):
        model = onnx.load(str(model), load_external_data=False)
    kept = (own.value for node in model.graph.node if node.name == node_name for own in node.metadata_props if own.key == KEY)
    return next(kept, None)


def untraceable(error: BaseException) -> str:
    """Why PyTorch could not trace a model, in one line, with the position in the model's source where it can be told."""
    frames = traceback.extract_tb(error.__traceback__)[1:]  # the first is the exporter's
    raised = "".join(f'File "{frame.filename}", line {frame.lineno}\n' for frame in frames)
    reason = str(error).strip().partition("\n")[0] or type(error).__name__
    return _at(reason, position_in(str(error)) or position_in(raised))


def unwritable(error: BaseException, traced: torch.export.ExportedProgram) -> str:
    """Why PyTorch's exporter could not write `traced` as ONNX, likewise."""
    said = str(error)
    lacking = re.search(r"No ONNX function found for <OpOverload\(op='([^']+)'", said)
    node = re.search(r"translating node %(\w+)", said)
    reason = f"ONNX has no operator for {lacking[1]}" if lacking else said.partition("\n")[0]
    # An operator that was taken apart first keeps the end of its name.
    traces = [own.meta.get("stack_trace") or "" for own in traced.graph.nodes if node and own.name.endswith(node[1])]
    return _at(reason, position_in(traces[0]) if traces else None)


def _at(reason: str, position: str | None) -> str:
    return f"{reason}, at {position}" if position else reason


def _in_package(file: Path) -> Path:
    """`file` from its outermost package on."""
    root = file.parent
    while (root / "__init__.py").exists():
        root = root.parent
    return file.relative_to(root)
