"""The batcher: pictures enter and leave at any step, and whatever is under way is drawn together.

One thread owns the engines' steps. Pictures of one step graph, which is of one size, guided or not, form a group, and the group
whose most urgent picture is due first takes the next step. So none waits for another group to end, and none starves: a deadline
only comes nearer.
"""

from __future__ import annotations

import heapq
import itertools
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np

from saferedir.engines import Manifest
from saferedir.engines.errors import CancelledError, DeadlineError, QueueFullError, SafeRedirError, SafetyEngineError
from saferedir.runtime.backend import Backend
from saferedir.runtime.job import Array, Denoised, Drawing, Job
from saferedir.runtime.rows import Rows

#: How long a picture may take, in times of what it takes alone, where nobody says: what orders pictures without a deadline.
USUAL_SLACK = 3.0
#: Seconds of a step until one was measured.
FIRST_GUESS = 0.05
#: Weight of the latest step in the average.
LATEST = 0.2
#: Called after every step with (steps done, steps in all), on the batcher's thread.
StepCallback = Callable[[int, int], None]
#: Called with an estimate of the finished picture, a latent [C, h, w], on the batcher's thread.
PreviewCallback = Callable[[Array], None]


@dataclass(order=True)
class Ticket:
    """A picture on its way through the batcher, in the order in which pictures are served."""

    #: Higher is served first.
    urgency: tuple[int, float, int]
    job: Job = field(compare=False)
    #: By when it is to be drawn, as `time.monotonic` counts; past it, it fails. None: whenever.
    deadline: float | None = field(compare=False)
    on_step: StepCallback | None = field(compare=False)
    #: After which steps a preview is made.
    previewed: frozenset[int] = field(compare=False, default=frozenset())
    on_preview: PreviewCallback | None = field(compare=False, default=None)
    #: A preview that no decision has seen yet.
    held: Array | None = field(compare=False, default=None)
    future: Future[Denoised] = field(compare=False, default_factory=Future)
    cancelled: bool = field(compare=False, default=False)

    def cancel(self) -> None:
        """Let it leave at the next step; `future` then raises `CancelledError`."""
        self.cancelled = True


class StepTimes:
    """What a step of so many rows took lately, by step graph, in seconds."""

    def __init__(self) -> None:
        self._seconds: dict[tuple[str, int], float] = {}

    def measured(self, engine: str, rows: int, seconds: float) -> None:
        before = self._seconds.get((engine, rows), seconds)
        self._seconds[engine, rows] = before + LATEST * (seconds - before)

    def of(self, engine: str, rows: int) -> float:
        """Of the nearest number of rows that was measured, as many times as there are rows of it more."""
        known = [own for other, own in self._seconds if other == engine]
        if not known:
            return FIRST_GUESS * rows
        nearest = min(known, key=lambda own: abs(own - rows))
        return self._seconds[engine, nearest] * max(1.0, rows / nearest)


class Batcher:
    """Draws with one backend. Its thread lives as long as there is something to draw."""

    def __init__(self, backend: Backend, manifest: Manifest, *, capacity: int | None = None, queue: int | None = None) -> None:
        """`capacity` pictures are under way in each group at most, by default what the engines are made for; at most `queue`
        wait, any number where it is None."""
        self.backend, self.manifest, self.queue = backend, manifest, queue
        self.capacity = min(capacity or manifest.max_batch, manifest.max_batch)
        self.times = StepTimes()
        self._counter = itertools.count()
        self._reset()

    def submit(
        self, drawing: Drawing, *, priority: int = 0, deadline: float | None = None, on_step: StepCallback | None = None,
        previewed: frozenset[int] = frozenset(), on_preview: PreviewCallback | None = None,
    ) -> Ticket:  # fmt: skip
        """Queue a picture.

        After the steps of `previewed` it is shown to `on_preview`, once the next step's detection has seen it, and only where
        that finds no concept.

        Raises:
            QueueFullError: as many wait as may.
        """
        ticket = Ticket(
            (-priority, self._due(drawing, deadline), next(self._counter)), Job(drawing), deadline, on_step,
            previewed=previewed, on_preview=on_preview,
        )  # fmt: skip
        self._queue([ticket])
        return ticket

    def submit_all(self, drawings: Sequence[Drawing], *, on_step: StepCallback | None = None) -> list[Ticket]:
        """Queue pictures that begin together where there is room.

        Raises:
            QueueFullError: as many wait as may; none of them is drawn.
        """
        tickets = [
            Ticket((0, self._due(drawing, None), next(self._counter)), Job(drawing), None, on_step) for drawing in drawings
        ]
        self._queue(tickets)
        return tickets

    def _due(self, drawing: Drawing, deadline: float | None) -> float:
        """By when it should be drawn, where it says no deadline itself."""
        if deadline is not None:
            return deadline
        return time.monotonic() + USUAL_SLACK * drawing.steps * self.times.of(drawing.engine, 1)

    def _queue(self, tickets: Sequence[Ticket]) -> None:
        if self._process != os.getpid():
            self._reset()
        with self._lock:
            if self.queue is not None and len(self._waiting) + len(tickets) > self.queue:
                raise QueueFullError(
                    f"{len(self._waiting)} pictures wait already, of {self.queue} that may", self._wait_seconds()
                )
            for ticket in tickets:
                heapq.heappush(self._waiting, ticket)
            self._start()

    def _start(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="saferedir-batcher", daemon=True)
            self._thread.start()

    def _reset(self) -> None:
        self._process = os.getpid()
        self._lock = threading.Lock()
        self._waiting: list[Ticket] = []
        self._thread: threading.Thread | None = None
        self._groups: dict[str, _Group] = {}

    def _wait_seconds(self) -> float:
        """Until the first of those under way is done, roughly."""
        under_way = [(group, ticket) for group in self._groups.values() for ticket in group.tickets]
        if not under_way:
            return FIRST_GUESS
        each = sum(self.times.of(group.rows.engine, len(group.tickets)) for group in self._groups.values() if group.tickets)
        return each * min(ticket.job.drawing.steps - ticket.job.done for _, ticket in under_way)

    def turn(self) -> None:
        """Let in what there is room for, let out what was cancelled or is late, and step the most urgent group once."""
        with self._lock:
            self._admit()
        self._leave_early()
        if due := [group for group in self._groups.values() if group.tickets]:
            self._step(min(due, key=lambda group: min(ticket.urgency for ticket in group.tickets)))

    def _run(self) -> None:
        while True:
            with self._lock:
                if not self._waiting and not any(group.tickets for group in self._groups.values()):
                    self._thread = None
                    return
            self.turn()

    def _admit(self) -> None:
        """Let those that wait into free rows, the most urgent first. Of a group that is full the others wait on."""
        kept: list[Ticket] = []
        while self._waiting:
            ticket = heapq.heappop(self._waiting)
            if ticket.cancelled or _late(ticket):
                _end(ticket)
                continue
            try:
                group = self._group(ticket.job.drawing.engine)
                if group.rows.free:
                    group.enter(ticket)
                else:
                    kept.append(ticket)
            except Exception as error:  # whatever a backend raises as it makes room
                _fail(ticket, error, 0)
        self._waiting = kept
        heapq.heapify(self._waiting)

    def _group(self, engine: str) -> _Group:
        if engine not in self._groups:
            self._groups[engine] = _Group(Rows(self.backend, self.manifest, engine, self.capacity))
        return self._groups[engine]

    def _leave_early(self) -> None:
        for group in self._groups.values():
            for ticket in list(group.tickets):
                if ticket.cancelled or _late(ticket):
                    group.leave(ticket)
                    _end(ticket)

    def _step(self, group: _Group) -> None:
        rows, count = group.rows, len(group.tickets)
        started = time.perf_counter()
        try:
            recorded = rows.step()
        except Exception as error:  # an engine's: it fails those that it was to draw
            for ticket in list(group.tickets):
                group.leave(ticket)
                _fail(ticket, error, ticket.job.done + 1, rows.engine)
            del self._groups[rows.engine]  # what is in its tensors nobody knows
            return
        self.times.measured(rows.engine, count, time.perf_counter() - started)
        for ticket, record in zip(list(group.tickets), recorded, strict=True):
            try:
                ticket.job.take(record)
                done = rows.denoised(ticket.job) if ticket.job.finished else None
            except Exception as error:
                group.leave(ticket)
                _fail(ticket, error, ticket.job.done, rows.engine)
                continue
            if ticket.on_step is not None:
                ticket.on_step(ticket.job.done, ticket.job.drawing.steps)
            _show(ticket, record, rows)
            if done is not None:
                group.leave(ticket)
                ticket.future.set_result(done)


class _Group:
    """The tickets of one step graph, in the order of their rows."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows
        self.tickets: list[Ticket] = []

    def enter(self, ticket: Ticket) -> None:
        self.rows.enter(ticket.job)
        self.tickets.append(ticket)

    def leave(self, ticket: Ticket) -> None:
        self.rows.leave(ticket.job)
        row = self.tickets.index(ticket)
        self.tickets[row] = self.tickets[-1]
        self.tickets.pop()


def _show(ticket: Ticket, record: Mapping[str, Array], rows: Rows) -> None:
    """Show the preview that this step's decision has seen, and hold the one that it has made."""
    held, ticket.held = ticket.held, None
    if ticket.on_preview is None or ticket.cancelled:
        return
    policy = ticket.job.drawing.policy
    # Scores, not firings: the detector looks while it rests after a firing as well.
    if held is not None and not np.any((record.get("score", 0) >= policy.threshold) & policy.enabled):
        ticket.on_preview(held)
    if ticket.job.done in ticket.previewed:
        ticket.held = rows.estimate(ticket.job)


def _late(ticket: Ticket) -> bool:
    return ticket.deadline is not None and time.monotonic() > ticket.deadline


def _end(ticket: Ticket) -> None:
    """Tell whoever waits that it was cancelled, or late."""
    steps = f"after {ticket.job.done} of {ticket.job.drawing.steps} steps"
    kind = CancelledError(f"cancelled {steps}") if ticket.cancelled else DeadlineError(f"its deadline passed {steps}")
    ticket.future.set_exception(kind)


def _fail(ticket: Ticket, error: Exception, step: int, engine: str = "") -> None:
    own = error if isinstance(error, SafeRedirError) else SafetyEngineError(f"engine {engine!r} raised in step {step}: {error}")
    ticket.future.set_exception(own)
