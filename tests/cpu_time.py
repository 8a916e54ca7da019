"""What tests cost, in seconds of CPU, which other processes on the machine do not change: said, and bounded.

A test that is not marked slow may take `MOST` by itself, fixtures not counted. It is several times what the longest takes, so
that a slow machine does not fail it.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Generator
from typing import Any

import pytest

MOST = 45.0
SHOWN = 12


def spent() -> float:
    """CPU of this process and of those it has waited for."""
    return sum(os.times()[:4])


class CpuTime:
    """A plugin of pytest."""

    def __init__(self) -> None:
        self.last = spent()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item) -> Generator[None, Any, Any]:
        """A report of a phase says what it cost, and fails where that is too much."""
        report = yield
        now = spent()
        report.cpu_s, self.last = now - self.last, now
        if report.when == "call" and report.passed and report.cpu_s > MOST and not item.get_closest_marker("slow"):
            report.outcome = "failed"
            report.longrepr = f"{item.nodeid} took {report.cpu_s:.0f} s of CPU; make it smaller, or mark it slow"
        return report

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        """The dearest phases and files."""
        reports = [report for kind in terminalreporter.stats.values() for report in kind if hasattr(report, "cpu_s")]
        files, phases = Counter[str](), Counter[str]()
        for report in reports:
            files[report.nodeid.split("::")[0]] += report.cpu_s
            phases[f"{report.when} {report.nodeid}"] += report.cpu_s
        terminalreporter.section(f"{sum(files.values()):.0f} s of CPU in tests")
        for name, seconds in [*files.most_common(SHOWN), *phases.most_common(SHOWN)]:
            if seconds >= 1:
                terminalreporter.line(f"{seconds:7.1f} s {name}")
