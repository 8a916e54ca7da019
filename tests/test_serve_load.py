"""A service under load, and under cases made of its own description."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from tiny_bundle import write_tiny_bundle

from benchmarks.serving.contract import contract
from benchmarks.serving.soak import soak


def check_soak(folder: Path, seconds: float) -> None:
    tiny = str(write_tiny_bundle(folder / "tiny"))
    found = asyncio.run(soak(folder, seconds, 20, 0, tiny, patience=(0.002, 0.02)))
    assert found["problems"] == []
    asked, answered, recorded = (sum(found[name].values()) for name in ("asked", "answered", "recorded"))
    never_began = found["answered"].get("queue_full", 0)
    assert asked - never_began == recorded == answered - never_began - found["answered"].get("invalid_value", 0)
    assert found["recorded"]["drawn"] > 0 and found["recorded"]["cancelled"] > 0
    first, last = found["memory_mb"]["first"], found["memory_mb"]["last"]
    assert last < first + 20
    assert found["descriptors"]["last"] <= found["descriptors"]["first"] + 40


def test_every_picture_that_is_asked_for_ends_in_one_record(tmp_path: Path) -> None:
    check_soak(tmp_path, 10)


@pytest.mark.slow
def test_for_three_minutes(tmp_path: Path) -> None:
    check_soak(tmp_path, 180)


@pytest.mark.parametrize("cases", [40, pytest.param(700, marks=pytest.mark.slow)])
def test_no_case_that_its_description_allows_breaks_the_service(cases: int, tmp_path: Path) -> None:
    tiny = str(write_tiny_bundle(tmp_path / "tiny"))
    found = contract(cases, tmp_path, 0, tiny)
    assert found["passed"], found["said"]
    assert found["cases"] >= cases and not any(status.startswith("5") for status in found["statuses"])
