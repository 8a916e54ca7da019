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

from scipy.stats import binomtest

RESULTS = Path(__file__).with_name("results")
PACKAGES = ("saferedir", "onnxruntime", "numpy", "torch", "diffusers", "transformers")


def environment() -> dict[str, Any]:
    """Machine, versions, command."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        model = names[0] if names else model
    return {
        "machine": f"{model}, {len(os.sched_getaffinity(0))} cores",
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES},
        "command": "python -m " + " ".join(["benchmarks." + Path(sys.argv[0]).stem, *sys.argv[1:]]),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }


def save(name: str, figures: dict[str, Any]) -> Path:
    """Write `results/NAME.json` with the environment beside the figures."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"environment": environment(), **figures}, indent=1) + "\n")
    return path


def share(hits: int, of: int) -> dict[str, float]:
    """A share with its exact (Clopper-Pearson) 95 % interval."""
    if of == 0:
        return {"share": float("nan"), "hits": 0, "of": 0, "low": float("nan"), "high": float("nan")}
    interval = binomtest(hits, of).proportion_ci(0.95, "exact")
    return {"share": hits / of, "hits": hits, "of": of, "low": float(interval.low), "high": float(interval.high)}
