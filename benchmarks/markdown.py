"""Figures as README and `FIGURES.md` write them: shares with their intervals, counts, and where they were measured."""

from __future__ import annotations

import json
from typing import Any

from benchmarks.report import RESULTS


def read_result(name: str) -> dict[str, Any]:
    """The stored result of that name."""
    data: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return data


def drawn_on(name: str) -> str:
    """Machine of a result and the ONNX Runtime it was made with."""
    own = read_result(name)["environment"]
    packages = own["packages"]
    runtime = next(f"{package} {packages[package]}" for package in ("onnxruntime", "onnxruntime-gpu") if package in packages)
    return f"{own['machine']}, with {runtime}"


def percent(value: float) -> str:
    """A share as a percentage."""
    return f"{100 * value:.1f} %"


def hits_of(value: dict[str, float]) -> str:
    """A share as its counts."""
    return f"{value['hits']} of {value['of']}"


def share_of(value: dict[str, float]) -> str:
    """A share with its interval."""
    return f"{percent(value['share'])} ({percent(value['low'])} to {percent(value['high'])})"


def refused(why: dict[str, str]) -> str:
    """What a table leaves out since it is refused, below it; nothing where nothing is."""
    listed = "; ".join(f"{what} ({said})" for what, said in why.items())
    return f"\n\nRefused: {listed}." if why else ""
