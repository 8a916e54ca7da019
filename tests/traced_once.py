"""Each graph is traced once in a test session, by whichever process needs it first: tracing is what tests spend most time on.

A trace is known by all that it depends on and that differs within a session: the module's code, settings and weights, the
shapes of its inputs and the operator set. Versions and source files do not change while tests run.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from enum import Enum
from functools import cache
from pathlib import Path
from types import CodeType, FunctionType, MethodType
from typing import Any

import numpy as np
import onnx
import torch
from filelock import FileLock
from torch import Tensor, nn
from torch.onnx._internal.exporter import _registration

from saferedir.export import parts
from saferedir.export.engine_graph import Graph

#: Attributes that no trace depends on: PyTorch's bookkeeping, where a model was opened from, what a module was made for.
HOOKS = "_hooks"
STATED = ("_name_or_path", "name_or_path", "text_encoder_sha256", "unet_sha256")
PLAIN = (str, bytes, int, float, bool, type(None), torch.dtype, torch.device, Path, Enum)


class UnknownPartError(Exception):
    """Something that a trace may depend on cannot be told from another."""


def traced_once(trace: Callable[[str, Graph, int], Any], folder: Path) -> Callable[[str, Graph, int], Any]:
    """`trace`, which gives what it or another process gave before for the same graph, kept in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)

    def traced(name: str, graph: Graph, opset: int) -> Any:
        try:
            path = folder / f"{key_of(name, graph, opset)}.onnx"
        except UnknownPartError:
            return trace(name, graph, opset)
        with FileLock(path.with_suffix(".lock")):
            if path.exists():
                return onnx.load(path)
            model = trace(name, graph, opset)
            onnx.save(model, path)
            return model

    return traced


def keep_operators(monkeypatch: Any) -> None:
    """PyTorch's exporter makes its table of operators once, and not again for every graph."""
    apis = _registration.onnxscript_apis
    monkeypatch.setattr(apis, "get_torchlib_ops", cache(apis.get_torchlib_ops))


def key_of(name: str, graph: Graph, opset: int) -> str:
    """A hash of what the trace of `graph` depends on.

    Raises:
        UnknownPartError: it depends on something that this module does not know.
    """
    digest = hashlib.sha256()
    inputs = {given: (str(tensor.dtype), tuple(tensor.shape)) for given, tensor in graph.inputs.items()}
    _add(digest, (name, graph.module.eval(), inputs, graph.outputs, graph.dynamic, opset), {})
    return digest.hexdigest()


def _add(digest: Any, part: Any, seen: dict[int, Any]) -> None:
    """`seen` holds what was added, since what is let go of gives its id to the next."""
    digest.update(type(part).__qualname__.encode())
    if isinstance(part, PLAIN):
        digest.update(repr(part).encode())
    elif isinstance(part, Tensor):
        digest.update(repr((part.dtype, part.shape)).encode())
        digest.update(part.detach().contiguous().view(-1).view(torch.uint8).numpy() if part.numel() else b"")
    elif isinstance(part, np.ndarray):
        digest.update(repr((part.dtype, part.shape)).encode() + part.tobytes())
    elif isinstance(part, set | frozenset):
        digest.update(repr(sorted(map(repr, part))).encode())
    elif isinstance(part, FunctionType | MethodType):
        _add_code(digest, part.__code__)
    elif isinstance(part, type):
        digest.update(f"{part.__module__}.{part.__qualname__}".encode())
    elif id(part) not in seen:
        seen[id(part)] = part
        for inner in _of_what(part):
            _add(digest, inner, seen)


def _of_what(part: Any) -> list[Any]:
    if isinstance(part, parts._Call):
        (called,) = part._called
        own = {name: value for name, value in vars(called).items() if name[0] != "_" and not isinstance(value, nn.Module)}
        return [type(called), type(called).output_shapes, own]
    if isinstance(part, nn.Module):
        kept = {name: value for name, value in vars(part).items() if HOOKS not in name}
        return [type(part), type(part).forward, kept]
    if isinstance(part, Mapping):
        return [inner for name, value in part.items() if name not in STATED for inner in (name, value)]
    if isinstance(part, list | tuple):
        return list(part)
    if hasattr(part, "__dict__"):
        return [type(part), vars(part)]
    raise UnknownPartError(type(part).__qualname__)


def _add_code(digest: Any, code: CodeType) -> None:
    digest.update(code.co_code + repr(code.co_names).encode())
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            _add_code(digest, constant)
        else:
            stated = sorted(map(repr, constant)) if isinstance(constant, frozenset) else constant
            digest.update(repr(stated).encode())
