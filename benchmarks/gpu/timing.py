"""Milliseconds of single steps among steps that are enqueued one after another, as a loop does, by the device's own clock."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from benchmarks.gpu.contestants import Pair, Step

#: Steps in a row of one kind; then it is the other's turn, so that a drift of the device's clock meets both.
IN_A_ROW = 5


@dataclass(frozen=True)
class Effort:
    """How long a pair is measured."""

    #: Of either kind.
    steps: int
    #: Measuring ends after so long, with however many steps.
    seconds: float
    #: Steps of either kind before measuring: the first ones load, compile and capture.
    warm_up: int = 3


class Clock:
    """Marks on the device between steps; on a CPU, which is through with a call when it returns, times of the host."""

    def __init__(self, device: torch.device, stream: int | None) -> None:
        self._on_device = device.type == "cuda"
        if self._on_device:
            self._stream = torch.cuda.current_stream() if stream is None else _stream_at(stream)

    def mark(self) -> Any:
        if not self._on_device:
            return time.perf_counter()
        event: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(self._stream)
        return event

    def wait(self) -> None:
        """Until all that was enqueued is done."""
        if self._on_device:
            torch.cuda.synchronize()

    def milliseconds(self, start: Any, end: Any) -> float:
        return float(start.elapsed_time(end)) if self._on_device else 1000 * (end - start)


@dataclass(frozen=True)
class Times:
    """Milliseconds of every step that was measured."""

    protected: list[float]
    plain: list[float]

    def figures(self) -> dict[str, Any]:
        """Medians and quartiles in milliseconds, and what the safety adds in milliseconds and of a plain step."""
        protected, plain = statistics.median(self.protected), statistics.median(self.plain)
        return {
            "steps": len(self.plain),
            "protected_ms": protected,
            "protected_quartiles_ms": quartiles(self.protected),
            "plain_ms": plain,
            "plain_quartiles_ms": quartiles(self.plain),
            "safety_ms": protected - plain,
            "safety_percent": 100 * (protected / plain - 1),
        }


def _stream_at(pointer: int) -> Any:
    """The stream of CUDA's that another library made."""
    return torch.cuda.ExternalStream(pointer)  # type: ignore[no-untyped-call]


def quartiles(values: list[float]) -> list[float]:
    """The first and the third."""
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return [first, third]


def measure(pair: Pair, device: torch.device, effort: Effort) -> Times:
    """Both kinds in turns, after a warm-up of each."""
    clock = Clock(device, pair.stream)
    for step in (pair.protected, pair.plain):
        for _ in range(effort.warm_up):
            step()
    clock.wait()
    times, started = Times([], []), time.monotonic()
    while len(times.plain) < effort.steps and (not times.plain or time.monotonic() - started < effort.seconds):
        for step, taken in ((pair.protected, times.protected), (pair.plain, times.plain)):
            taken += _in_a_row(step, clock, min(IN_A_ROW, effort.steps))
    return times


def _in_a_row(step: Step, clock: Clock, steps: int) -> list[float]:
    """The first step, which an idle device waits for, is not counted."""
    step()
    marks = [clock.mark()]
    for _ in range(steps):
        step()
        marks.append(clock.mark())
    clock.wait()
    return [clock.milliseconds(*both) for both in pairwise(marks)]
