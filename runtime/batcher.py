"""The batcher: pictures enter and leave at any step, and whatever is under way is drawn together.

One thread owns the engines' steps. Pictures of one step graph, which is of one size, guided or not, form a group, and the group
whose first picture is due takes the next step. So none waits for another group to end, and none starves: what is due only comes
nearer. Free rows go to whoever came first: so what was predicted of a picture those that come later do not change much.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from saferedir.engines import Manifest
from saferedir.engines.errors import CancelledError, DeadlineError, QueueFullError, SafeRedirError, SafetyEngineError
from saferedir.runtime.backend import Backend
from saferedir.runtime.job import Array, Denoised, Drawing, Job
from saferedir.runtime.prediction import FIRST_GUESS, StepTimes, seconds_until_drawn
from saferedir.runtime.rows import Rows
from saferedir.runtime.ticket import Ticket

log = logging.getLogger("saferedir")

#: By when a picture should be drawn, in times of what it takes alone: what orders those that have no nearer deadline.
USUAL_SLACK = 3.0
#: Seconds by which a step of priority brings a picture forward: who has waited longer than that goes first all the same.
PRIORITY_SECONDS = 5.0


class Batcher:
    """Draws with one backend. Its thread lives as long as there is something to draw."""

    _waiting: list[Ticket]
    _reserved: list[Ticket]
    _groups: dict[str, _Group]
    _thread: threading.Thread | None

    def __init__(self, backend: Backend, manifest: Manifest, *, capacity: int | None = None, queue: int | None = None) -> None:
        """`capacity` pictures are under way in each group at most, by default what the engines are made for; at most `queue`
        wait, any number where it is None."""
        self.backend, self.manifest, self.queue = backend, manifest, queue
        self.capacity = min(capacity or manifest.max_batch, manifest.max_batch)
        self.times = StepTimes()
        #: Called after each step of a group with (rows, seconds), on the batcher's thread.
        self.on_turn: Callable[[int, float], None] | None = None
        self._counter = itertools.count()
        self._reset()

    def prepare(self, engines: Sequence[str]) -> None:
        """Make the rows of these step graphs, and measure their steps, before anything is drawn.

        Raises:
            BackendError, SafetyEngineError: an engine cannot be loaded, or raises.
        """
        with self._lock:
            for engine in engines:
                try:
                    for size, seconds in self._group(engine).rows.prepare():
                        self.times.measured(engine, size, seconds)
                except SafeRedirError:
                    raise
                except Exception as error:  # a backend raises types of its own
                    raise SafetyEngineError(f"engine {engine!r} raised: {error}") from error

    @property
    def waiting(self) -> int:
        """Pictures that wait for a row, or for their prompts."""
        return len(self._waiting) + sum(not ticket.cancelled for ticket in self._reserved)

    @property
    def running(self) -> int:
        """Pictures in rows."""
        return sum(len(group.tickets) for group in list(self._groups.values()))

    def reserve(
        self, engine: str, steps: int, pictures: int = 1, *, priority: int = 0, deadline: float | None = None
    ) -> list[Ticket]:
        """Places for pictures of `steps` on the step graph `engine`, to be submitted soon, or cancelled.

        Raises:
            QueueFullError: as many wait as may, or they could not be drawn by their deadline. None is drawn.
        """
        now = time.monotonic()
        due = now + USUAL_SLACK * steps * self.times.of(engine, 1)
        due, came = (own - PRIORITY_SECONDS * priority for own in (due if deadline is None else min(due, deadline), now))
        tickets = [Ticket((came, next(self._counter)), due, engine, steps, deadline) for _ in range(pictures)]
        if self._process != os.getpid():
            self._reset()
        with self._lock:
            self._reserved = [ticket for ticket in self._reserved if not ticket.cancelled]
            waiting = [*self._waiting, *self._reserved]
            if self.queue is not None and len(waiting) + pictures > self.queue:
                message = f"{len(waiting)} pictures wait already, of {self.queue} that may"
                raise QueueFullError(message, self._seconds_until_one_is_drawn())
            if self.queue is not None or deadline is not None:
                predicted = now + self._seconds_until_drawn([*waiting, *tickets], tickets[-1])
                if deadline is not None and predicted > deadline:
                    message = f"it would be drawn in {predicted - now:.1f} s, {predicted - deadline:.1f} s past its deadline"
                    raise QueueFullError(message, predicted - deadline)
                for ticket in tickets:
                    ticket.predicted = predicted
            self._reserved += tickets
        return tickets

    def submit(self, tickets: Sequence[Ticket], drawings: Sequence[Drawing]) -> None:
        """Draw these in the places that were reserved for them. They begin together where there is room."""
        for ticket, drawing in zip(tickets, drawings, strict=True):
            ticket.job = Job(drawing)
        with self._lock:
            self._reserved = [ticket for ticket in self._reserved if ticket not in tickets]
            for ticket in tickets:
                heapq.heappush(self._waiting, ticket)
            self._start()

    def _seconds_until_drawn(self, waiting: Sequence[Ticket], last: Ticket) -> float:
        ahead = {id(ticket): ticket.ahead for ticket in waiting}
        under_way = [ticket.ahead for group in self._groups.values() for ticket in list(group.tickets)]
        return seconds_until_drawn(ahead[id(last)], under_way, [*ahead.values()], self.capacity, self.times.expected)

    def _seconds_until_one_is_drawn(self) -> float:
        """Until the first of those under way is drawn, or of those that wait where none is."""
        everyone = [ticket.ahead for group in self._groups.values() for ticket in list(group.tickets)]
        everyone = everyone or [ticket.ahead for ticket in (*self._waiting, *self._reserved)]
        if not everyone:
            return FIRST_GUESS
        groups = {own.engine: sum(other.engine == own.engine for other in everyone) for own in everyone}
        turn = sum(self.times.of(engine, min(count, self.capacity)) for engine, count in groups.items())
        return turn * min(own.steps for own in everyone)

    def _start(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="saferedir-batcher", daemon=True)
            self._thread.start()

    def _reset(self) -> None:
        self._process = os.getpid()
        self._lock = threading.Lock()
        self._waiting, self._reserved, self._groups, self._thread = [], [], {}, None

    def turn(self) -> None:
        """Let in what there is room for, let out what was cancelled or is late, and step the group that is due once."""
        with self._lock:
            self._admit()
        self._leave_early()
        if due := [group for group in self._groups.values() if group.tickets]:
            self._step(min(due, key=lambda group: min(ticket.due for ticket in group.tickets)))

    def _run(self) -> None:
        while True:
            with self._lock:
                if not self._waiting and not any(group.tickets for group in self._groups.values()):
                    self._thread = None
                    self.times.forget_company()
                    return
            try:
                self.turn()
            except Exception as error:  # of ours: nobody waits for what will not come
                log.exception("the batcher failed")
                self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        """Fail all pictures there are, and begin anew."""
        with self._lock:
            tickets = [*self._waiting, *(ticket for group in self._groups.values() for ticket in group.tickets)]
            self._waiting, self._groups = [], {}
        for ticket in tickets:
            if not ticket.future.done():
                _fail(ticket, error, ticket.done, ticket.engine)

    def _admit(self) -> None:
        """Let those that wait into free rows, whoever came first. Of a group that is full the others wait on."""
        kept: list[Ticket] = []
        while self._waiting:
            ticket = heapq.heappop(self._waiting)
            if ticket.cancelled or _late(ticket):
                _end(ticket)
                continue
            try:
                group = self._group(ticket.engine)
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
                _fail(ticket, error, ticket.done + 1, rows.engine)
            del self._groups[rows.engine]  # what is in its tensors nobody knows
            return
        for ticket, record in zip(list(group.tickets), recorded, strict=True):
            try:
                done = _taken(rows, ticket, record)
                if ticket.on_step is not None:
                    ticket.on_step(ticket.done, ticket.steps)
                _show(ticket, record, rows)
            except Exception as error:
                group.leave(ticket)
                _fail(ticket, error, ticket.done, rows.engine)
                continue
            if done is not None:
                group.leave(ticket)
                ticket.future.set_result(done)
        seconds = time.perf_counter() - started
        self.times.taken(rows.engine, count, seconds)
        if self.on_turn is not None:
            self.on_turn(count, seconds)


class _Group:
    """The tickets of one step graph, in the order of their rows."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows
        self.tickets: list[Ticket] = []

    def enter(self, ticket: Ticket) -> None:
        assert ticket.job is not None
        self.rows.enter(ticket.job)
        self.tickets.append(ticket)

    def leave(self, ticket: Ticket) -> None:
        assert ticket.job is not None
        self.rows.leave(ticket.job)
        row = self.tickets.index(ticket)
        self.tickets[row] = self.tickets[-1]
        self.tickets.pop()


def _taken(rows: Rows, ticket: Ticket, record: Mapping[str, Array]) -> Denoised | None:
    """Give the picture what a step recorded of it. What is left of it, if that was its last."""
    assert ticket.job is not None
    ticket.job.take(record)
    return rows.denoised(ticket.job) if ticket.job.finished else None


def _show(ticket: Ticket, record: Mapping[str, Array], rows: Rows) -> None:
    """Show the preview that this step's decision has seen, and hold the one that it has made."""
    held, ticket.held = ticket.held, None
    if ticket.on_preview is None or ticket.cancelled or ticket.job is None:
        return
    policy = ticket.job.drawing.policy
    # Scores, not firings: the detector looks while it rests after a firing as well.
    if held is not None and not np.any((record.get("score", 0) >= policy.threshold) & policy.enabled):
        ticket.on_preview(held)
    if ticket.done in ticket.previewed:
        ticket.held = rows.estimate(ticket.job)


def _late(ticket: Ticket) -> bool:
    return ticket.deadline is not None and time.monotonic() > ticket.deadline


def _end(ticket: Ticket) -> None:
    """Tell whoever waits that it was cancelled, or late."""
    steps = f"after {ticket.done} of {ticket.steps} steps"
    kind = CancelledError(f"cancelled {steps}") if ticket.cancelled else DeadlineError(f"its deadline passed {steps}")
    ticket.future.set_exception(kind)


def _fail(ticket: Ticket, error: Exception, step: int, engine: str = "") -> None:
    own = error if isinstance(error, SafeRedirError) else SafetyEngineError(f"engine {engine!r} raised in step {step}: {error}")
    ticket.future.set_exception(own)
