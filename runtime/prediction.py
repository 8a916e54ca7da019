"""When a picture will be drawn: the batcher's own order, played forward with the step times that were measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

#: Seconds of a step of one row until one was measured.
FIRST_GUESS = 0.05
#: Weight of the latest step in the average of times, and of rows.
LATEST, LATEST_ROWS = 0.2, 0.05
#: A step that took more than so many times what is known, since the machine paused, counts as that.
MOST_AT_ONCE = 2.0


class StepTimes:
    """What a step of so many rows took lately, by step graph, in seconds; and how many rows steps had of late."""

    def __init__(self) -> None:
        self._seconds: dict[str, dict[int, float]] = {}
        self._least: dict[str, dict[int, float]] = {}
        self._rows: dict[str, float] = {}

    def measured(self, engine: str, rows: int, seconds: float) -> None:
        known = self._seconds.setdefault(engine, {})
        before = known.get(rows, seconds)
        known[rows] = before + LATEST * (min(seconds, MOST_AT_ONCE * before) - before)
        least = self._least.setdefault(engine, {})
        least[rows] = min(seconds, least.get(rows, seconds))

    def taken(self, engine: str, rows: int, seconds: float) -> None:
        """The same of a step that was asked for, which says how many come as well."""
        self.measured(engine, rows, seconds)
        before = self._rows.get(engine, 0.0)
        self._rows[engine] = before + LATEST_ROWS * (rows - before)

    def forget_company(self) -> None:
        """Nobody is there any more, and nobody is expected."""
        self._rows.clear()

    def expected(self, engine: str, rows: int) -> float:
        """Of `rows` that are known of, if others come as they did of late and take the rows that become free."""
        return self.of(engine, max(rows, self._rows.get(engine, 0.0)))

    def of(self, engine: str, rows: float) -> float:
        """Between two numbers of rows that were measured on the line between them; beyond them, in proportion to the rows."""
        return self._between(self._seconds.get(engine), rows)

    def at_best(self, engine: str, rows: float) -> float:
        """The same by the fastest steps there were."""
        return self._between(self._least.get(engine), rows)

    @staticmethod
    def _between(known: dict[int, float] | None, rows: float) -> float:
        if not known:
            return FIRST_GUESS * rows
        sizes = sorted(known)
        inside = min(max(rows, sizes[0]), sizes[-1])
        return float(np.interp(inside, sizes, [known[size] for size in sizes])) * max(1.0, rows / sizes[-1])


@dataclass
class Ahead:
    """A picture that is under way or waits, with the steps that it still needs."""

    #: Free rows go to the lowest.
    urgency: tuple[float, int]
    #: Turns go to the step graph of the lowest.
    due: float
    engine: str
    steps: int


def seconds_until_drawn(
    last: Ahead, under_way: Sequence[Ahead], waiting: Sequence[Ahead], capacity: int, seconds: Callable[[str, int], float]
) -> float:
    """Until `last`, one of those that wait, is drawn. `capacity` is of the rows of each step graph."""
    queue = sorted(waiting, key=lambda own: own.urgency)
    left = {id(own): own.steps for own in (*under_way, *queue)}
    rows: dict[str, list[Ahead]] = {}
    for own in under_way:
        rows.setdefault(own.engine, []).append(own)
    now = 0.0
    while left[id(last)] > 0:
        kept = []
        for own in queue:
            group = rows.setdefault(own.engine, [])
            if len(group) < capacity:
                group.append(own)
            else:
                kept.append(own)
        queue = kept
        engine, group = min(
            ((name, group) for name, group in rows.items() if group), key=lambda item: min(own.due for own in item[1])
        )
        turns = min(left[id(own)] for own in group)  # until the first of them leaves, nothing changes
        now += turns * seconds(engine, len(group))
        for own in group:
            left[id(own)] -= turns
        rows[engine] = [own for own in group if left[id(own)] > 0]
    return now
