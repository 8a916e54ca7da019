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

import numpy as np
import numpy.typing as npt
from scipy.stats import binomtest

RESULTS = Path(__file__).with_name("results")
#: The trained judge; it measures, so it is no part of the package.
JUDGE = Path(__file__).with_name("judge")
#: Below so many successes or failures a bootstrap says too little.
FEW = 10
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


def clustered_share(
    outcomes: npt.NDArray[np.bool_], names: npt.NDArray[np.str_], *, seed: int = 0, draws: int = 2000
) -> dict[str, float]:
    """The share of true outcomes, one a prompt, with a 95 % bootstrap interval over names and prompts within a name.

    With fewer than ten outcomes of either kind the exact interval over prompts is given instead.
    """
    hits, of = int(outcomes.sum()), len(outcomes)
    if min(hits, of - hits) < FEW:
        return share(hits, of)
    rng = np.random.default_rng(seed)
    groups = [outcomes[names == name] for name in np.unique(names)]
    shares = np.empty(draws)
    for draw in range(draws):
        drawn = [groups[index] for index in rng.integers(len(groups), size=len(groups))]
        counts = [(int(rng.binomial(len(group), group.mean())), len(group)) for group in drawn]
        shares[draw] = sum(hit for hit, _ in counts) / sum(size for _, size in counts)
    low, high = np.quantile(shares, (0.025, 0.975))
    return {"share": hits / of, "hits": hits, "of": of, "low": float(low), "high": float(high)}
