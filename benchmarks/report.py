"""What every benchmark states about itself, and where it writes its figures."""

from __future__ import annotations

import json
import os
import platform
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from saferedir.runtime.doctor import find_gpu
from saferedir.runtime.installation import installed_distributions

RESULTS = Path(__file__).with_name("results")
#: What measures, and is therefore no part of the package: both judges, and the image-text score of this world.
NETWORKS = Path(__file__).with_name("networks")
PACKAGES = ("saferedir", "numpy", "torch", "diffusers", "transformers")


def environment() -> dict[str, Any]:
    """Machine, versions, command."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        model = names[0] if names else model
    return {
        "machine": f"{model}, {len(os.sched_getaffinity(0))} cores{_gpu()}",
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES} | installed_distributions(),
        "command": " ".join(["python -m", _module(Path(sys.argv[0])), *sys.argv[1:]]),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }


def _module(script: Path) -> str:
    """What `python -m` was given: a module of the benchmarks, or a package of them."""
    place = script.resolve().with_suffix("")
    parts = place.parts[place.parts.index("benchmarks") :] if "benchmarks" in place.parts else (place.name,)
    return ".".join(part for part in parts if part != "__main__")


def _gpu() -> str:
    gpu = find_gpu()
    return "" if gpu is None else f", {gpu}"


def save(name: str, figures: dict[str, Any], folder: Path = RESULTS) -> Path:
    """Write `NAME.json` with the environment beside the figures, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps({"environment": environment(), **figures}, indent=1) + "\n")
    os.replace(partial, path)
    return path
