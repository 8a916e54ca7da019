"""The batcher: whoever comes and goes, every picture is the one that it is alone; and one request's trouble is its own."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_bundle import write_tiny_bundle

from benchmarks.equality import ARRIVALS, Bench, StillBatcher, assert_same
from saferedir.engines import DEFAULT_BUNDLE, open_bundle
from saferedir.engines.errors import (
    BackendError,
    CancelledError,
    DeadlineError,
    NonFiniteError,
    QueueFullError,
    SafetyEngineError,
)
from saferedir.runtime import Pipeline
from saferedir.runtime.backend import BackendAround, Call, Tensors
from saferedir.runtime.backends import make_backend
from saferedir.runtime.job import Job
from saferedir.runtime.ort import Bound
from saferedir.runtime.pipeline import Events, _next
from saferedir.runtime.prediction import FIRST_GUESS
from saferedir.runtime.replay import Runs, record_runs, replay
from saferedir.runtime.rows import Rows, ladder
from saferedir.runtime.ticket import Ticket


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    bundle = open_bundle(write_tiny_bundle(tmp_path_factory.mktemp("batcher") / "tiny", sees=True))
    return Bench(Pipeline.from_bundle(bundle.folder, backend="ort-cpu", threads=1))


@given(ARRIVALS)
@settings(max_examples=200, deadline=None)
def test_a_picture_is_the_same_whoever_comes_and_goes(tiny: Bench, arrivals: list[Any]) -> None:
    tiny.check(arrivals)


@pytest.mark.parametrize("threads", [1, 2])
def test_a_picture_of_the_embedded_model_is_the_same_in_company(threads: int) -> None:
    bench = Bench(Pipeline.from_bundle(backend="ort-cpu", threads=threads))
    arrivals = [
        (turn, (seed, steps, sampler, guidance, seed % 3), cancelled)
        for seed, (turn, steps, sampler, guidance, cancelled) in enumerate([
            (0, 6, "ddim", 5.0, None), (0, 4, "euler-ancestral", 7.5, None), (1, 3, "ddim", 1.0, None),
            (2, 9, "dpm++-2m-karras", 3.0, 5), (3, 5, "lcm", 5.0, None), (4, 2, "euler", 5.0, None),
        ])
    ]  # fmt: skip
    bench.check(arrivals)


class Captured(BackendAround):
    """Another backend, as if its steps were captured."""

    captures = True

    def __init__(self, backend: Any) -> None:
        super().__init__(backend)
        self.captures, self.sizes = True, set[int]()

    def bind(self, engine: str, inputs: Tensors, outputs: Tensors, rows: int | None = None) -> Call:
        self.sizes.add(rows or 0)
        return super().bind(engine, inputs, outputs, rows)


def test_where_steps_are_captured_few_numbers_of_rows_are_and_others_are_padded(tiny: Bench) -> None:
    backend = Captured(tiny.pipeline.backend)
    batcher = StillBatcher(backend, tiny.manifest)
    batcher.prepare(["step"])
    prepared = set(backend.sizes)
    pictures = [(seed, 2 + seed, "euler", 5.0, 1) for seed in range(tiny.manifest.max_batch)]
    tickets = [batcher.draw(tiny.drawing(*picture)) for picture in pictures]
    while not all(ticket.future.done() for ticket in tickets):
        batcher.turn()
    assert backend.sizes == prepared == set(ladder(tiny.manifest.max_batch))
    for ticket, picture in zip(tickets, pictures, strict=True):
        assert_same(ticket.future.result(), tiny.lone(*picture))


def test_rows_that_only_pad_a_batch_are_not_compared(tiny: Bench) -> None:
    recorded = record_runs(tiny.pipeline.bundle, lambda: Captured(tiny.pipeline.backend), Runs(3, 2))
    assert {len(call["latent"]) for call in recorded["step"]} == {3}
    replayed = replay(tiny.pipeline.bundle, tiny.pipeline.backend, "step", recorded)
    assert np.isfinite(replayed["next_latent"]).all()


def forgets_rows(names: tuple[str, ...]) -> Any:
    """What `Rows.leave` does, without moving these tensors."""

    def leave(rows: Rows, job: Job) -> None:
        kept = {id(rows._placed[name]) for name in names if name in rows._placed}
        kept |= {id(side) for name in names if name in rows._state for side in rows._state[name]}
        backend, moved = rows.backend, rows.backend.move
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(backend, "move", lambda tensor, *rows: id(tensor) in kept or moved(tensor, *rows), raising=False)
            LEAVE(rows, job)

    return leave


LEAVE = Rows.leave


@pytest.mark.parametrize(
    "names", [("active", "cooldown"), ("negative", "original"), ("threshold",), ("period",), ("denoised",)]
)
def test_rows_that_were_confused_would_be_seen(tiny: Bench, monkeypatch: pytest.MonkeyPatch, names: tuple[str, ...]) -> None:
    """What the equality of pictures alone and in company is worth: with such a fault in the batcher it does not hold."""
    arrivals = [(seed, (seed, 7 + seed, "ddim", 5.0, seed % 3), None) for seed in range(6)]
    tiny.check(arrivals)
    monkeypatch.setattr(Rows, "leave", forgets_rows(names))
    with pytest.raises(AssertionError):
        tiny.check(arrivals)


def test_a_ladder_ends_with_all_rows() -> None:
    assert ladder(1) == (1,) and ladder(4) == (1, 2, 4) and ladder(6) == (1, 2, 4, 6)


def test_one_that_is_not_finite_fails_alone(tiny: Bench) -> None:
    pictures = [(seed, 6, "ddim", 5.0, 0) for seed in range(4)]
    drawings = [tiny.drawing(*picture) for picture in pictures]
    drawings[2] = replace(drawings[2], prompt=np.full_like(drawings[2].prompt, np.nan))
    batcher = tiny.batcher()
    tickets = [batcher.draw(drawing) for drawing in drawings]
    while not all(ticket.future.done() for ticket in tickets):
        batcher.turn()
    assert isinstance(tickets[2].future.exception(), NonFiniteError)
    for row in (0, 1, 3):
        assert_same(tickets[row].future.result(), tiny.lone(*pictures[row]))


class Raising(BackendAround):
    """Another backend, of which one call raises."""

    def __init__(self, backend: Any, at: int) -> None:
        super().__init__(backend)
        self.at, self.calls = at, 0

    def bind(self, engine: str, inputs: Tensors, outputs: Tensors, rows: int | None = None) -> Call:
        call = super().bind(engine, inputs, outputs, rows)

        def counted() -> None:
            self.calls += 1
            if self.calls == self.at:
                raise RuntimeError("out of memory")
            call()

        return counted


def test_an_engine_that_raises_fails_those_in_the_call_once(tiny: Bench) -> None:
    batcher = StillBatcher(Raising(tiny.pipeline.backend, at=3), tiny.manifest)
    tickets = [batcher.draw(tiny.drawing(seed, 5, "euler", 5.0, 0)) for seed in range(3)]
    while not all(ticket.future.done() for ticket in tickets):
        batcher.turn()
    for ticket in tickets:
        with pytest.raises(SafetyEngineError, match="engine 'step' raised in step 3: out of memory"):
            ticket.future.result()
    after = batcher.draw(tiny.drawing(1, 5, "euler", 5.0, 0))
    while not after.future.done():
        batcher.turn()
    assert_same(after.future.result(), tiny.lone(1, 5, "euler", 5.0, 0))


def test_a_free_row_is_taken_in_the_next_step(tiny: Bench) -> None:
    batcher = tiny.batcher()
    tickets = [batcher.draw(tiny.drawing(seed, 2 + seed, "ddim", 5.0, 0)) for seed in range(tiny.manifest.max_batch)]
    last = batcher.draw(tiny.drawing(9, 40, "ddim", 5.0, 0))
    batcher.turn()
    assert [ticket.done for ticket in tickets] == [1] * len(tickets) and last.done == 0
    batcher.turn()
    assert tickets[0].future.done()
    batcher.turn()
    assert last.done == 1


def test_the_group_whose_picture_is_due_first_steps_next(tiny: Bench) -> None:
    batcher = tiny.batcher()
    long = batcher.draw(tiny.drawing(0, 50, "ddim", 5.0, 0))
    short = batcher.draw(tiny.drawing(1, 2, "ddim", 1.0, 0))
    batcher.turn(), batcher.turn()
    assert short.future.done() and long.done == 0


def test_past_its_deadline_a_picture_is_not_drawn(tiny: Bench) -> None:
    batcher = tiny.batcher()
    late = batcher.draw(tiny.drawing(0, 50, "ddim", 5.0, 0), deadline=time.monotonic() + 60)
    batcher.turn()
    late.deadline = time.monotonic() - 1
    batcher.turn()
    with pytest.raises(DeadlineError, match="its deadline passed after 1 of 50 steps"):
        late.future.result()


def test_what_could_not_be_drawn_in_time_is_refused_at_once(tiny: Bench) -> None:
    batcher = tiny.batcher()
    batcher.times.measured("step", 1, 1.0)
    with pytest.raises(QueueFullError, match=r"it would be drawn in 50\.0 s, 20\.0 s past its deadline") as refused:
        batcher.reserve("step", 50, deadline=time.monotonic() + 30)
    assert refused.value.retry_after == pytest.approx(20, abs=0.1)


def test_times_that_a_pause_made_too_long_do_not_close_an_idle_batcher(tiny: Bench) -> None:
    batcher = tiny.batcher()
    batcher.times.measured("step", 1, 0.1)
    for _ in range(50):
        batcher.times.measured("step", 1, 10.0)
    (ticket,) = batcher.reserve("step", 50, deadline=time.monotonic() + 30)
    with pytest.raises(QueueFullError):  # beside another one the latest times count
        batcher.reserve("step", 50, deadline=time.monotonic() + 30)
    ticket.cancel()
    with pytest.raises(QueueFullError):  # not even the fastest steps would do
        batcher.reserve("step", 50, deadline=time.monotonic() + 4)


def test_a_pause_of_the_machine_counts_little(tiny: Bench) -> None:
    times = tiny.batcher().times
    times.measured("step", 1, 0.1)
    times.measured("step", 1, 100.0)
    assert times.of("step", 1) == pytest.approx(0.12)


def test_a_step_that_binds_is_not_measured(tiny: Bench) -> None:
    batcher = tiny.batcher()
    batcher.draw(tiny.drawing(0, 5, "ddim", 5.0, 0))
    batcher.turn(), batcher.turn()  # one for either side of the state
    assert batcher.times.of("step", 1) == FIRST_GUESS
    batcher.turn()
    assert batcher.times.of("step", 1) != FIRST_GUESS


def test_without_a_thread_the_call_fails_and_the_next_may_draw(tiny: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = Pipeline(tiny.pipeline.bundle, tiny.pipeline.backend)

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(BackendError, match="no thread can be started"):
            pipeline("a cat", num_inference_steps=2)
    assert pipeline("a cat", num_inference_steps=2).images


def test_a_call_that_waits_for_a_row_is_cancelled_at_once(tiny: Bench) -> None:
    pipeline, cancel = Pipeline(tiny.pipeline.bundle, tiny.pipeline.backend), threading.Event()
    pipeline.batcher._start = lambda: None  # type: ignore[method-assign]  # nobody takes a step
    threading.Timer(0.1, cancel.set).start()
    plan = pipeline.plan("a cat", num_inference_steps=2)
    (ticket,) = pipeline.batcher.reserve("step", 2)
    with pytest.raises(CancelledError, match="cancelled after 0 of 2 steps"):
        _next(Events(), cancel, "cancelled after 0 of 2 steps")
    assert plan.requests and not ticket.submitted


def test_whoever_waited_in_vain_may_ask_again_at_once(tiny: Bench) -> None:
    batcher = tiny.batcher(capacity=1)
    batcher.draw(tiny.drawing(0, 5, "ddim", 5.0, 0))
    batcher.turn()
    waits = batcher.draw(tiny.drawing(1, 5, "ddim", 5.0, 0))
    again: list[Ticket] = []
    waits.future.add_done_callback(lambda future: again.extend(batcher.reserve("step", 5)))
    waits.cancel()
    batcher.turn()
    assert len(again) == 1


def test_a_closed_batcher_draws_nothing_more(tiny: Bench) -> None:
    pipeline = Pipeline(tiny.pipeline.bundle, tiny.pipeline.backend)
    (ticket,) = pipeline.batcher.reserve("step", 50)
    pipeline.batcher.submit([ticket], [tiny.drawing(0, 50, "ddim", 5.0, 0)])
    pipeline.batcher.close()
    assert isinstance(ticket.future.exception(timeout=5), CancelledError)
    with pytest.raises(CancelledError, match="closed"):
        pipeline("a cat")


def test_a_process_that_ends_while_a_picture_is_drawn_ends_in_order(tmp_path: Path) -> None:
    code = """
import sys, time, threading
from saferedir.runtime import Pipeline
pipeline = Pipeline.from_bundle(sys.argv[1], backend="ort-cpu", threads=1)
run = pipeline.backend.bind
def bind(*arguments):
    call = run(*arguments)
    return lambda: (time.sleep(0.2), call())
pipeline.backend.bind = bind
threading.Thread(target=lambda: pipeline("a cat", num_inference_steps=50), daemon=True).start()
time.sleep(0.5)
"""
    folder = write_tiny_bundle(tmp_path / "tiny")
    ended = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, check=False, timeout=60)
    assert ended.returncode == 0, ended.stderr


@given(st.lists(st.tuples(st.integers(1, 12), st.sampled_from(["step", "step_unguided"])), min_size=1, max_size=20))
@settings(max_examples=30, deadline=None)
def test_when_a_picture_is_drawn_is_predicted_to_the_turn(tiny: Bench, wanted: list[tuple[int, str]]) -> None:
    batcher, turns = tiny.batcher(), 0
    for engine in ("step", "step_unguided"):
        for rows in (1, tiny.manifest.max_batch):
            batcher.times.measured(engine, rows, 100.0)  # a step takes as long whatever it holds
    batcher.times.taken = lambda *measured: None  # type: ignore[method-assign]
    now = time.monotonic()
    tickets = []
    for steps, engine in wanted:
        drawing = tiny.drawing(steps, steps, "ddim", 5.0 if engine == "step" else 1.0, 0)
        tickets.append(batcher.draw(drawing, deadline=now + 1e6))
    last = max(tickets)  # those that came later do not change what was predicted of the last in order
    predicted = batcher._seconds_until_drawn(tickets, last)
    while not last.future.done():
        batcher.turn()
        turns += 1
    assert round(predicted / 100) == turns


def test_engines_that_several_threads_call_compute_one_at_a_time() -> None:
    bundle = open_bundle(DEFAULT_BUNDLE)
    pipeline = Pipeline(bundle, make_backend(bundle, "ort-cpu", threads=1, shared=True))
    inside, most = [0], [0]
    run = Bound.run

    def counted(bound: Bound, options: Any = None) -> None:
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        run(bound, options)
        inside[0] -= 1

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Bound, "run", counted)
        calls = [threading.Thread(target=pipeline.decode, args=(np.zeros((1, 4, 16, 16), np.float32),)) for _ in range(4)]
        for call in calls:
            call.start()
        pipeline("a cat", num_inference_steps=4)
        for call in calls:
            call.join()
    assert most == [1]


def test_as_much_company_is_expected_as_there_was_of_late(tiny: Bench) -> None:
    times, most = tiny.batcher().times, tiny.manifest.max_batch
    times.measured("step", 1, 1.0)
    for _ in range(200):
        times.taken("step", most, 5.0)
    assert times.expected("step", 1) == pytest.approx(5.0, rel=0.01)
    assert times.expected("step_unguided", most) == FIRST_GUESS * most  # of another graph nothing is known
    times.forget_company()
    assert times.expected("step", 1) == 1.0


def test_whoever_waits_long_comes_before_a_higher_priority(tiny: Bench) -> None:
    batcher = tiny.batcher(capacity=1)
    busy = batcher.draw(tiny.drawing(0, 2, "ddim", 5.0, 0))
    batcher.turn()
    (waits,) = batcher.reserve("step", 2)
    waits.urgency = (waits.urgency[0] - 60, waits.urgency[1])  # a minute ago
    batcher.submit([waits], [tiny.drawing(1, 2, "ddim", 5.0, 0)])
    favoured = batcher.draw(tiny.drawing(2, 2, "ddim", 5.0, 0), priority=10)
    usual = batcher.draw(tiny.drawing(3, 2, "ddim", 5.0, 0))
    ended = []
    for ticket in (busy, waits, favoured, usual):
        ticket.future.add_done_callback(lambda future, ticket=ticket: ended.append(ticket))
    while len(ended) < 4:
        batcher.turn()
    assert ended == [busy, waits, favoured, usual]


def test_a_place_that_is_given_up_is_free_again(tiny: Bench) -> None:
    batcher = tiny.batcher(queue=1, capacity=1)
    batcher.draw(tiny.drawing(0, 5, "ddim", 5.0, 0))
    batcher.turn()
    (ticket,) = batcher.reserve("step", 5)
    with pytest.raises(QueueFullError):
        batcher.reserve("step", 5)
    ticket.cancel()
    batcher.reserve("step", 5)


def test_a_full_queue_says_when_to_come_again(tiny: Bench) -> None:
    batcher = tiny.batcher(queue=2, capacity=2)
    batcher.reserve("step", 5, 4)  # for two of them there are rows
    with pytest.raises(QueueFullError, match="3 pictures would wait, and 2 may") as refused:
        batcher.draw(tiny.drawing(3, 5, "ddim", 5.0, 0))
    assert refused.value.retry_after > 0


def test_nothing_is_allocated_while_the_same_pictures_are_under_way(tiny: Bench) -> None:
    asked: list[str] = []

    class Asked(BackendAround):
        def upload(self, array: Any) -> Any:
            asked.append("upload")
            return super().upload(array)

        def bind(self, engine: str, inputs: Tensors, outputs: Tensors, rows: int | None = None) -> Call:
            asked.append("bind")
            return super().bind(engine, inputs, outputs, rows)

        def move(self, tensor: Any, target: int, source: int) -> None:
            asked.append("move")
            super().move(tensor, target, source)

    batcher = StillBatcher(Asked(tiny.pipeline.backend), tiny.manifest)
    tickets = [batcher.draw(tiny.drawing(seed, 9, "ddim", 5.0, 0)) for seed in range(3)]
    batcher.turn(), batcher.turn()  # a call is bound for either side of the state
    made = list(asked)
    for _ in range(6):
        batcher.turn()
    assert asked == made and "move" not in made
    assert [ticket.done for ticket in tickets] == [8, 8, 8]
