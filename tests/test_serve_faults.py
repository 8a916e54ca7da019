"""What breaks under a service: no picture leaves without the safety's work or without its record, and it recovers."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.serving.faults import FAULTS, Fault, drained, run, worker_killed
from benchmarks.serving.partial_images import partial_images

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("fault", FAULTS, ids=[fault.injected for fault in FAULTS])
def test_a_fault_lets_nothing_through(fault: Fault, tmp_path: Path) -> None:
    row = run(fault, tmp_path)
    assert (row["unprotected"], row["gaps"]) == (0, 0)
    assert row["answers"] >= 1


def test_a_killed_worker_is_replaced(tmp_path: Path) -> None:
    row = worker_killed(tmp_path)
    assert (row["pictures"], row["unprotected"], row["gaps"]) == (2, 0, 0)


def test_a_stopped_service_finishes_what_it_began(tmp_path: Path) -> None:
    row = drained(tmp_path)
    assert (row["pictures"], row["unprotected"], row["gaps"]) == (8, 0, 0)
    assert "exit 0" in row["recovery"]


def test_no_picture_in_progress_shows_a_concept(tmp_path: Path) -> None:
    seen = partial_images(18, tmp_path)
    assert seen["found"] == [] and seen["asked"] == seen["sent"] + seen["withheld"] == 18
