"""ONNX Runtime as it is installed: which distribution provides it, and without its telemetry."""

from __future__ import annotations

import importlib.util
import os
from importlib import metadata
from typing import Any

from saferedir.engines.errors import MissingDependencyError

MODULE = "onnxruntime"
#: ONNX Runtime 1.32 writes an identifier of the machine and a database under ~/.cache/Microsoft unless this is 1 when it is
#: imported. Who wants that sets it to 0.
TELEMETRY = "ORT_DISABLE_TELEMETRY"


def installed_distributions() -> dict[str, str]:
    """The distributions that provide the module `onnxruntime`, with their versions; exactly one is right.

    There are many (onnxruntime-gpu, -openvino, -directml, -rocm, ort-nightly), so the module is asked for, not a name.
    """
    spec = importlib.util.find_spec(MODULE)
    if spec is None or spec.origin is None:  # nothing, or a folder that an uninstalled one left
        return {}
    return {found.name: found.version for found in metadata.distributions() if _provides_it(found)}


def installation_problem() -> str | None:
    """What is wrong with the installation of ONNX Runtime, or None where the module is there and of one distribution."""
    spec = importlib.util.find_spec(MODULE)
    if spec is None or spec.origin is None:
        return "ONNX Runtime is not installed; install saferedir[cpu], or saferedir[gpu] for CUDA"
    found = sorted(installed_distributions())
    if len(found) > 1:
        return (
            f"both {' and '.join(found)} are installed and overwrite each other; uninstall them all, "
            "then install saferedir[cpu] or saferedir[gpu], or the one that you mean"
        )
    return None


def import_onnxruntime() -> Any:
    """The module `onnxruntime`, which sends nothing and writes nothing of its own, unless ORT_DISABLE_TELEMETRY is set to 0.

    Raises:
        MissingDependencyError: it is not installed, or several distributions of it are.
    """
    if problem := installation_problem():
        raise MissingDependencyError(problem)
    off = os.environ.setdefault(TELEMETRY, "1") != "0"
    import onnxruntime

    if off and (switch := getattr(onnxruntime, "disable_telemetry_events", None)) is not None:
        switch()  # it may have been imported before
    return onnxruntime


def _provides_it(distribution: metadata.Distribution) -> bool:
    return MODULE in (distribution.read_text("top_level.txt") or "").split()
