"""Verification of a bundle: hashes, tensors read back from the engines, parity with the eager reference."""

from __future__ import annotations

import importlib.util
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from saferedir.engines import Bundle, open_bundle
from saferedir.engines.errors import BundleAlteredError, RequestError
from saferedir.engines.manifest import EngineInfo
from saferedir.runtime.ort import import_onnxruntime

ORT_TYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(int32)": "int32",
    "tensor(int64)": "int64",
    "tensor(bool)": "bool",
}


@dataclass(frozen=True)
class ParityRow:
    """One output of one engine against the eager reference."""

    engine: str
    output: str
    worst: float
    #: Index of the worst element.
    where: str
    allowed: float


@dataclass(frozen=True)
class VerificationReport:
    """What `verify` found."""

    files: int
    engines: int
    #: None where torch or the reference is not here.
    parity: list[ParityRow] | None
    parity_note: str

    @property
    def passed(self) -> bool:
        return self.parity is None or all(row.worst <= row.allowed for row in self.parity)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"passed": self.passed}


def verify_bundle(path_or_name: str | Path, model: Path | None = None, safety: Path | None = None) -> VerificationReport:
    """Open the bundle with its hashes, read every engine's tensors back, and compare with the reference if it is here.

    Raises:
        BundleError: a file is missing or altered, or an engine's tensors are not what the manifest says.
        RequestError: a reference was named, but torch is not installed.
    """
    bundle = open_bundle(path_or_name)
    for name, info in bundle.manifest.engines.items():
        _check_tensors(bundle, name, info)
    counts = (len(bundle.manifest.files), len(bundle.manifest.engines))
    if any(importlib.util.find_spec(package) is None for package in ("torch", "diffusers", "onnx")):
        if model is not None or safety is not None:
            raise RequestError("comparing with a reference needs torch; install saferedir[export]")
        return VerificationReport(*counts, None, "parity not checked: torch is not installed (saferedir[export] brings it)")
    from saferedir.export.parity import compare_with_reference  # loads torch

    rows = compare_with_reference(bundle, model, safety)
    return VerificationReport(*counts, [ParityRow(**asdict(row)) for row in rows], "")


def _check_tensors(bundle: Bundle, name: str, info: EngineInfo) -> None:
    ort = import_onnxruntime()
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    path = bundle.engine_path(name)
    try:
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime raises several types of its own
        raise BundleAlteredError(f"{path} cannot be loaded: {error}") from error
    for stated, found in ((info.inputs, session.get_inputs()), (info.outputs, session.get_outputs())):
        read = [(tensor.name, ORT_TYPES.get(tensor.type, tensor.type), tuple(tensor.shape)) for tensor in found]
        told = [(tensor.name, tensor.dtype, tensor.shape) for tensor in stated]
        if read != told:
            raise BundleAlteredError(f"{path} has tensors {read}, the manifest says {told}")
