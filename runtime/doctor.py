"""What this machine has for drawing: packages, providers, devices, and what to do about what is missing."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from saferedir.runtime.backends import ENTRY_POINT_GROUP, backend_names
from saferedir.runtime.installation import import_onnxruntime, installation_problem, installed_distributions
from saferedir.runtime.ort import PROVIDERS, can_be_had, is_offered
from saferedir.runtime.tensorrt import MODULES as TENSORRT
from saferedir.runtime.tensorrt import installed_version
from saferedir.runtime.threads import available_cores

PACKAGES = (
    "numpy",
    "pillow",
    "tokenizers",
    "typer",
    "rich",
    "torch",
    "diffusers",
    "tensorrt-rtx",
    "onnxruntime-ep-nv-tensorrt-rtx",
)


@dataclass(frozen=True)
class BackendStatus:
    """Whether a backend can be had here, and if not, why and how to get it."""

    name: str
    available: bool
    note: str


@dataclass(frozen=True)
class Diagnosis:
    """Everything `saferedir doctor` says."""

    machine: dict[str, str]
    packages: dict[str, str | None]
    backends: list[BackendStatus]
    #: What keeps the runtime from drawing at all; empty where all is well.
    problems: list[str]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def diagnose() -> Diagnosis:
    """Look at the installation without loading any engine."""
    problem = installation_problem()
    return Diagnosis(
        machine={
            "python": platform.python_version(),
            "system": f"{platform.system()} {platform.machine()}",
            "cores": f"{available_cores()} of {os.cpu_count()}",
            "gpu": find_gpu() or "none found (no nvidia-smi)",
        },
        packages={**{name: _version(name) for name in PACKAGES}, **(installed_distributions() or {"onnxruntime": None})},
        backends=[_status(name, problem) for name in backend_names() if name != "auto"],
        problems=[problem] if problem else [],
    )


def _status(name: str, problem: str | None) -> BackendStatus:
    if name in TENSORRT:
        installed = installed_version(name)
        gpu = shutil.which("nvidia-smi") is not None
        note = f"version {installed}" if installed else "install saferedir[tensorrt]"
        return BackendStatus(name, bool(installed and gpu), note if gpu or not installed else f"{note}, but no NVIDIA GPU")
    if name not in PROVIDERS:
        found = importlib.util.find_spec("torch") is not None
        return BackendStatus(name, found, f"entry point of {ENTRY_POINT_GROUP}" if found else "install saferedir[torch]")
    if problem:
        return BackendStatus(name, False, problem)
    provider = PROVIDERS[name]
    offered = import_onnxruntime().get_available_providers()
    if not is_offered(provider, offered):
        return BackendStatus(name, False, provider.advice)
    if not can_be_had(provider, offered):
        return BackendStatus(name, False, f"{provider.ort_name}, but no NVIDIA GPU or no driver")
    return BackendStatus(name, True, provider.ort_name)


def find_gpu() -> str | None:
    """NVIDIA GPUs with driver and compute capability, one a line; None where there is no nvidia-smi."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return None
    query = [command, "--query-gpu=name,driver_version,compute_cap", "--format=csv,noheader"]
    try:
        rows = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True).stdout.strip().splitlines()
    except (OSError, subprocess.SubprocessError):
        return "nvidia-smi fails"
    fields = [row.split(", ") for row in rows]
    return "\n".join(f"{', '.join(name)} (driver {driver}, compute capability {card})" for *name, driver, card in fields)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
