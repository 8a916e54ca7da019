"""Resident rows: the tensors of the pictures that one step graph draws together, a row each.

They are made once. A picture enters a free row, the last one takes the place of one that leaves, and in between a step writes
only what the host knows of it and reads only what it records.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from saferedir.engines.manifest import PUBLISHED, Manifest, kind
from saferedir.engines.step import Role, form_of_step, step_tensors
from saferedir.runtime.backend import Backend, Call, DeviceTensor
from saferedir.runtime.job import Denoised, Job

Array = npt.NDArray[Any]
#: Nothing, until a step has given something.
BLANK = {"float32": np.nan, "int32": -1, "bool": False}


def ladder(capacity: int) -> tuple[int, ...]:
    """1, 2, 4, 8 and so on up to `capacity`, which ends it."""
    return (*(2**power for power in range(capacity.bit_length()) if 2**power < capacity), capacity)


class Rows:
    """Up to `capacity` pictures that `engine` draws together."""

    def __init__(self, backend: Backend, manifest: Manifest, engine: str, capacity: int) -> None:
        self.backend, self.engine, self.capacity = backend, engine, capacity
        self.jobs: list[Job] = []
        tensors = step_tensors(form_of_step(kind(engine), published=manifest.controller == PUBLISHED))
        inputs, outputs = manifest.tensors(engine)
        shapes = {tensor.name: tuple(map(int, tensor.shape[1:])) for tensor in (*inputs, *outputs)}
        self._blanks: dict[str, Array] = {}
        self._placed: dict[str, DeviceTensor] = {}
        #: A step reads the state on one side and gives it on the other.
        self._state: dict[str, tuple[DeviceTensor, DeviceTensor]] = {}
        self._per_step: dict[str, Array] = {}
        self._every_step, self._last_step = [], []
        self._side = 0
        for tensor in tensors:
            shape = (capacity, *shapes[tensor.name])
            blank = np.full(shape, BLANK[tensor.dtype], tensor.dtype)
            if tensor.role is Role.STATE:
                self._state[tensor.name] = (backend.upload(blank), backend.upload(blank))
            else:
                self._placed[tensor.name] = backend.upload(blank)
            if tensor.role is Role.PER_STEP:
                self._per_step[tensor.name] = np.zeros(shape, tensor.dtype)
            elif tensor.every_step:
                self._every_step.append(tensor)
                self._blanks[tensor.output] = blank
            elif tensor.role is Role.RECORD:
                self._last_step.append(tensor.name)
        self._constants = [tensor.name for tensor in tensors if tensor.role is Role.CONSTANT]
        self._noisy = True  # what the rows of noise hold is not known to be zero
        self._sizes = ladder(capacity) if backend.captures else tuple(range(1, capacity + 1))
        self._calls: dict[tuple[int, int], Call] = {}
        #: Whether the last step was the first of its kind, which loads, binds or captures: its time says nothing.
        self.first_of_its_kind = False

    @property
    def free(self) -> int:
        return self.capacity - len(self.jobs)

    def prepare(self) -> Iterator[tuple[int, float]]:
        """Call the engine on a few numbers of rows before anyone is there: each, and the seconds that it took then.

        Raises:
            whatever the engine raises.
        """
        sizes = self._sizes if self.backend.captures else sorted({1, self.capacity})  # between them times are on a line
        for size in sizes:
            for side in (0, 1, 0, 1) if self.backend.captures else (0, 1):  # the first calls load, capture and allocate
                self._side = side
                call = self._call(size)
                started = time.perf_counter()
                call()
                self.backend.read(self._placed[self._constants[0]], 0, 1)  # waits for the device
                seconds = time.perf_counter() - started
            yield size, seconds

    def enter(self, job: Job) -> None:
        """Put the job into a free row."""
        row, values = len(self.jobs), job.first()
        for name in self._constants:
            self.backend.write(self._placed[name], row, values[name][None])
        for name, sides in self._state.items():
            self.backend.write(sides[self._side], row, values[name][None])
        self.jobs.append(job)

    def leave(self, job: Job) -> None:
        """Free the job's row; the last one moves there."""
        row, last = self.jobs.index(job), len(self.jobs) - 1
        if row != last:
            kept = [self._placed[name] for name in (*self._constants, *self._last_step)]
            resident = kept + [sides[self._side] for sides in self._state.values()]
            for tensor in resident:
                self.backend.move(tensor, row, last)
            self.jobs[row] = self.jobs[last]
        self.jobs.pop()

    def step(self) -> list[tuple[Job, dict[str, Array]]]:
        """One step of every job that is here: each, and what the step records of it, by output.

        Raises:
            whatever the engine raises; no job has taken anything then.
        """
        count = len(self.jobs)
        self._write_what_differs(count)
        after = 1 - self._side
        for tensor in self._every_step:
            target = self._state[tensor.name][after] if tensor.role is Role.STATE else self._placed[tensor.name]
            self.backend.write(target, 0, self._blanks[tensor.output][:count])
        self._call(count)()
        self._side = after
        read = {
            tensor.output: self.backend.read(
                self._state[tensor.name][after] if tensor.role is Role.STATE else self._placed[tensor.name], 0, count
            )
            for tensor in self._every_step
        }
        return [(job, {name: values[row] for name, values in read.items()}) for row, job in enumerate(self.jobs)]

    def denoised(self, job: Job) -> Denoised:
        """What is left of a job that is here after its last step."""
        row = self.jobs.index(job)
        (latent,) = self.backend.read(self._state["latent"][self._side], row, 1)
        mask = self.backend.read(self._placed["token_mask"], row, 1)[0] if self._last_step else None
        return job.denoised(latent, mask)

    def estimate(self, job: Job) -> Array:
        """What the last step took for the finished picture, a latent [C, h, w]."""
        row = self.jobs.index(job)
        estimate: Array = self.backend.read(self._state["denoised"][self._side], row, 1)[0]
        return estimate

    def _write_what_differs(self, count: int) -> None:
        rows = [job.next() for job in self.jobs]
        for name, host in self._per_step.items():
            given = [row[name] for row in rows]
            if name == "noise":
                adds = any(noise is not None for noise in given)
                if not adds and not self._noisy:
                    continue
                self._noisy = adds
            for row, value in enumerate(given):
                host[row] = 0 if value is None else value
            host[count:] = 0
            self.backend.write(self._placed[name], 0, host if name == "noise" else host[:count])

    def _call(self, count: int) -> Call:
        """A step of the first `count` rows, or of a few more that hold nobody."""
        count = next(size for size in self._sizes if size >= count)
        key = count, self._side
        self.first_of_its_kind = key not in self._calls
        if self.first_of_its_kind:
            before = {name: sides[self._side] for name, sides in self._state.items()}
            after = {f"next_{name}": sides[1 - self._side] for name, sides in self._state.items()}
            self._calls[key] = self.backend.bind(self.engine, self._placed | before, self._placed | after, count)
        return self._calls[key]
