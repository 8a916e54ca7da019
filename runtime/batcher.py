"""The batcher: pictures enter and leave at any step, and whatever is under way is drawn together.

One thread owns the engines' steps. Pictures of one step graph, which is of one size, guided or not, form a group, and the group
whose first picture is due takes the next step. So none waits for another group to end, and none starves: what is due only comes
nearer. Free rows go to whoever came first: so what was predicted of a picture those that come later do not change much.
"""

from __future__ import annotations

import atexit
import heapq
import itertools
import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from weakref import WeakSet

import numpy as np

from saferedir.engines import Manifest
from saferedir.engines.errors import (
    BackendError,
    CancelledError,
    DeadlineError,
    QueueFullError,
    SafeRedirError,
    SafetyEngineError,
)
from saferedir.runtime.backend import Backend
from saferedir.runtime.job import Array, Drawing, Job
from saferedir.runtime.prediction import FIRST_GUESS, StepTimes, seconds_until_drawn
from saferedir.runtime.rows import Rows
from saferedir.runtime.ticket import Ticket

log = logging.getLogger("saferedir")

#: By when a picture should be drawn, in times of what it takes alone: what orders those that have no nearer deadline.
USUAL_SLACK = 3.0
#: Seconds by which a step of priority brings a picture forward: who has waited longer than that goes first all the same.
PRIORITY_SECONDS = 5.0
#: How long closing waits for the step that is under way.
CLOSE_SECONDS = 60.0


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
        _OPEN.add(self)

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
            CancelledError: the batcher is closed.
        """
        now = time.monotonic()
        due = now + USUAL_SLACK * steps * self.times.of(engine, 1)
        due, came = (own - PRIORITY_SECONDS * priority for own in (due if deadline is None else min(due, deadline), now))
        tickets = [Ticket((came, next(self._counter)), due, engine, steps, deadline) for _ in range(pictures)]
        if self._process != os.getpid():
            self._reset()
        with self._lock:
            if self._closed:
                raise CancelledError("nothing more is drawn; this batcher is closed")
            self._reserved = [ticket for ticket in self._reserved if not ticket.cancelled]
            waiting = [*self._waiting, *self._reserved]
            if self.queue is not None and (many := self._without_a_row([*waiting, *tickets])) > self.queue:
                message = f"{many} pictures would wait, and {self.queue} may"
                raise QueueFullError(message, self._seconds_until_one_is_drawn())
            if self.queue is not None or deadline is not None:
                predicted = now + self._seconds_until_drawn([*waiting, *tickets], tickets[-1])
                if deadline is not None and predicted > deadline and not self._may_try(tickets, now, deadline):
                    message = f"it would be drawn in {predicted - now:.1f} s, {predicted - deadline:.1f} s past its deadline"
                    raise QueueFullError(message, predicted - deadline)
                for ticket in tickets:
                    ticket.predicted = predicted
            self._reserved += tickets
        return tickets

    def submit(self, tickets: Sequence[Ticket], drawings: Sequence[Drawing]) -> None:
        """Draw these in the places that were reserved for them. They begin together where there is room.

        Raises:
            BackendError: the system gives no thread to draw with. CancelledError: the batcher is closed. None is drawn.
        """
        for ticket, drawing in zip(tickets, drawings, strict=True):
            ticket.job = Job(drawing)
        with self._lock:
            self._reserved = [ticket for ticket in self._reserved if ticket not in tickets]
            if self._closed:
                raise CancelledError("nothing more is drawn; this batcher is closed")
            try:
                self._start()
            except RuntimeError as error:
                raise BackendError(f"no thread can be started to draw with: {error}") from error
            for ticket in tickets:
                heapq.heappush(self._waiting, ticket)
                ticket.submitted = True

    def close(self) -> None:
        """Let all pictures leave at the next step, and wait for it. Nothing more is drawn."""
        if self._process != os.getpid():  # of the process that this one was forked from
            return
        with self._lock:
            self._closed = True
            thread = self._thread
            for ticket in (*self._waiting, *self._reserved, *self._under_way()):
                ticket.cancel()
        if thread is not None:
            thread.join(CLOSE_SECONDS)

    def _under_way(self) -> list[Ticket]:
        return [ticket for group in self._groups.values() for ticket in list(group.tickets.values())]

    def _may_try(self, tickets: Sequence[Ticket], now: float, deadline: float) -> bool:
        """Whether to draw all the same, since nothing else is: times that a pause made too long would never be corrected."""
        seconds = tickets[0].steps * self.times.at_best(tickets[0].engine, len(tickets))
        return not (self._waiting or self._reserved or self.running) and now + seconds <= deadline

    def _without_a_row(self, tickets: Sequence[Ticket]) -> int:
        """How many of these find no free row when they come."""
        taken = {engine: len(group.tickets) for engine, group in self._groups.items()}
        wanted = Counter(ticket.engine for ticket in tickets)
        return sum(max(0, count - self.capacity + taken.get(engine, 0)) for engine, count in wanted.items())

    def _seconds_until_drawn(self, waiting: Sequence[Ticket], last: Ticket) -> float:
        ahead = {id(ticket): ticket.ahead for ticket in waiting}
        under_way = [ticket.ahead for ticket in self._under_way()]
        return seconds_until_drawn(ahead[id(last)], under_way, [*ahead.values()], self.capacity, self.times.expected)

    def _seconds_until_one_is_drawn(self) -> float:
        """Until the first of those under way is drawn, or of those that wait where none is."""
        everyone = [ticket.ahead for ticket in self._under_way() or (*self._waiting, *self._reserved)]
        if not everyone:
            return FIRST_GUESS
        groups = {own.engine: sum(other.engine == own.engine for other in everyone) for own in everyone}
        turn = sum(self.times.of(engine, min(count, self.capacity)) for engine, count in groups.items())
        return turn * min(own.steps for own in everyone)

    def _start(self) -> None:
        if self._thread is None:
            thread = threading.Thread(target=self._run, name="saferedir-batcher", daemon=True)
            thread.start()
            self._thread = thread

    def _reset(self) -> None:
        self._process = os.getpid()
        self._lock = threading.Lock()
        self._waiting, self._reserved, self._groups, self._thread, self._closed = [], [], {}, None, False

    def turn(self) -> None:
        """Let in what there is room for, let out what was cancelled or is late, and step the group that is due once."""
        with self._lock:
            refused = self._admit()
        for ticket, error in refused:  # out of the lock: whoever waits for them may come back at once
            ticket.future.set_exception(error)
        self._leave_early()
        if due := [group for group in self._groups.values() if group.tickets]:
            self._step(min(due, key=lambda group: min(ticket.due for ticket in group.tickets.values())))

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
            tickets = [*self._waiting, *self._under_way()]
            self._waiting, self._groups = [], {}
        for ticket in tickets:
            if not ticket.future.done():
                ticket.future.set_exception(_raised(error, ticket.done, ticket.engine))

    def _admit(self) -> list[tuple[Ticket, SafeRedirError]]:
        """Let those that wait into free rows, whoever came first. Of a group that is full the others wait on.

        Those that wait no longer, and why.
        """
        kept, refused = [], []
        while self._waiting:
            ticket = heapq.heappop(self._waiting)
            if ticket.cancelled or _late(ticket):
                refused.append((ticket, _left(ticket)))
                continue
            try:
                group = self._group(ticket.engine)
                if group.rows.free:
                    group.enter(ticket)
                else:
                    kept.append(ticket)
            except Exception as error:  # whatever a backend raises as it makes room
                refused.append((ticket, _raised(error, 0, ticket.engine)))
        self._waiting = kept  # in order, so that it is a heap
        return refused

    def _group(self, engine: str) -> _Group:
        if engine not in self._groups:
            self._groups[engine] = _Group(Rows(self.backend, self.manifest, engine, self.capacity))
        return self._groups[engine]

    def _leave_early(self) -> None:
        for group in self._groups.values():
            for ticket in list(group.tickets.values()):
                if ticket.cancelled or _late(ticket):
                    group.leave(ticket)
                    ticket.future.set_exception(_left(ticket))

    def _step(self, group: _Group) -> None:
        rows, count = group.rows, len(group.tickets)
        started = time.perf_counter()
        try:
            recorded = rows.step()
        except Exception as error:  # an engine's: it fails those that it was to draw
            with self._lock:
                del self._groups[rows.engine]  # what is in its tensors nobody knows
            for ticket in group.tickets.values():
                ticket.future.set_exception(_raised(error, ticket.done + 1, rows.engine))
            return
        for job, record in recorded:
            ticket = group.tickets[job]
            try:
                job.take(record)
                done = rows.denoised(job) if job.finished else None
                if ticket.on_step is not None:
                    ticket.on_step(ticket.done, ticket.steps)
                _show(ticket, record, rows)
            except Exception as error:
                group.leave(ticket)
                ticket.future.set_exception(_raised(error, ticket.done, rows.engine))
                continue
            if done is not None:
                group.leave(ticket)
                ticket.future.set_result(done)
        seconds = time.perf_counter() - started
        if not rows.first_of_its_kind:
            self.times.taken(rows.engine, count, seconds)
        if self.on_turn is not None:
            self.on_turn(count, seconds)


#: Batchers whose threads end before the interpreter does.
_OPEN: WeakSet[Batcher] = WeakSet()


@atexit.register
def _close_all() -> None:
    """A thread that came back from an engine into an interpreter that ends would abort the process."""
    for batcher in list(_OPEN):
        batcher.close()


class _Group:
    """The pictures of one step graph."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows
        self.tickets: dict[Job, Ticket] = {}

    def enter(self, ticket: Ticket) -> None:
        assert ticket.job is not None
        self.rows.enter(ticket.job)
        self.tickets[ticket.job] = ticket

    def leave(self, ticket: Ticket) -> None:
        assert ticket.job is not None
        self.rows.leave(ticket.job)
        del self.tickets[ticket.job]


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


def _left(ticket: Ticket) -> SafeRedirError:
    """It was cancelled, or late."""
    steps = f"after {ticket.done} of {ticket.steps} steps"
    return CancelledError(f"cancelled {steps}") if ticket.cancelled else DeadlineError(f"its deadline passed {steps}")


def _raised(error: Exception, step: int, engine: str) -> SafeRedirError:
    """An error with a type of ours."""
    return (
        error if isinstance(error, SafeRedirError) else SafetyEngineError(f"engine {engine!r} raised in step {step}: {error}")
    )
