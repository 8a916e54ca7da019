"""The batcher: whoever comes and goes, every picture is the one that it is alone; and one request's trouble is its own."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_bundle import write_tiny_bundle

from saferedir.engines import open_bundle
from saferedir.engines.errors import CancelledError, DeadlineError, NonFiniteError, QueueFullError, SafetyEngineError
from saferedir.runtime import Pipeline
from saferedir.runtime.backend import BackendAround, Call, Tensors
from saferedir.runtime.batcher import Batcher, Ticket
from saferedir.runtime.job import Denoised, Drawing
from saferedir.runtime.policy import SafetyPolicy, resolve
from saferedir.runtime.schedulers import SCHEDULERS, make_schedule

SAMPLERS = tuple(SCHEDULERS)
#: Steps that lcm draws at most.
MOST_STEPS = 50


class Bench:
    """A bundle, pictures to draw with it, and what each is alone."""

    def __init__(self, pipeline: Pipeline) -> None:
        self.pipeline, self.manifest = pipeline, pipeline.manifest
        names = [concept.name for concept in self.manifest.safety.concepts]
        usual = SafetyPolicy()
        always = SafetyPolicy(thresholds=dict.fromkeys(names, 0.0), cooldown=1)
        one = SafetyPolicy(enabled=names[:1], cooldown=0)
        self.policies = [resolve(policy, self.manifest.safety) for policy in (usual, always, one)]
        self.alone: dict[tuple[Any, ...], Denoised] = {}

    def drawing(self, seed: int, steps: int, sampler: str, guidance: float, policy: int) -> Drawing:
        model, scheduler = self.manifest.model, self.manifest.scheduler
        assert model is not None and scheduler is not None
        words = np.random.default_rng(seed % 5).standard_normal((2, model.prompt_tokens, model.prompt_width))
        prompt, negative = words.astype(np.float32)
        return Drawing(
            engine="step" if guidance > 1 else "step_unguided",
            schedule=make_schedule(scheduler, model.prediction_type, steps, sampler),
            prompt=prompt, negative=negative, guidance_scale=guidance, guidance_rescale=0.0, policy=self.policies[policy],
            seed=seed, size=(model.latent_channels, model.latent_height, model.latent_width),
        )  # fmt: skip

    def batcher(self, **options: Any) -> Batcher:
        """One whose turns the test takes itself."""
        return StillBatcher(self.pipeline.backend, self.manifest, **options)

    def lone(self, *picture: Any) -> Denoised:
        if picture not in self.alone:
            batcher = self.batcher()
            ticket = batcher.submit(self.drawing(*picture))
            while not ticket.future.done():
                batcher.turn()
            self.alone[picture] = ticket.future.result()
        return self.alone[picture]


class StillBatcher(Batcher):
    """Without a thread."""

    def _start(self) -> None:
        pass


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    bundle = open_bundle(write_tiny_bundle(tmp_path_factory.mktemp("batcher") / "tiny"))
    return Bench(Pipeline.from_bundle(bundle.folder, backend="ort-cpu", threads=1))


PICTURES = st.tuples(
    st.integers(0, 30), st.integers(1, MOST_STEPS), st.sampled_from(SAMPLERS), st.sampled_from([1.0, 3.0, 7.5]),
    st.integers(0, 2),
)  # fmt: skip
#: Turn of arrival, picture, and after how many of its steps it is cancelled, if at all.
ARRIVALS = st.lists(st.tuples(st.integers(0, 60), PICTURES, st.one_of(st.none(), st.integers(0, 40))), min_size=1, max_size=12)


@given(ARRIVALS)
@settings(max_examples=60, deadline=None)
def test_a_picture_is_the_same_whoever_comes_and_goes(tiny: Bench, arrivals: list[Any]) -> None:
    check_equality(tiny, arrivals)


def check_equality(bench: Bench, arrivals: list[Any]) -> None:
    batcher = bench.batcher()
    tickets: list[tuple[Ticket, Any, int | None]] = []
    waiting, turn = sorted(arrivals, key=lambda arrival: arrival[0]), 0
    while waiting or not all(ticket.future.done() for ticket, _, _ in tickets):
        while waiting and waiting[0][0] <= turn:
            _, picture, cancelled = waiting.pop(0)
            tickets.append((batcher.submit(bench.drawing(*picture)), picture, cancelled))
        for ticket, _, cancelled in tickets:
            if cancelled is not None and ticket.job.done >= cancelled:
                ticket.cancel()
        batcher.turn()
        turn += 1
    for ticket, picture, cancelled in tickets:
        if cancelled is not None and cancelled < picture[1]:
            assert isinstance(ticket.future.exception(), CancelledError)
            assert ticket.job.done == cancelled
            continue
        assert_same(ticket.future.result(), bench.lone(*picture))


def assert_same(found: Denoised, expected: Denoised) -> None:
    for name, value in vars(expected).items():
        assert getattr(found, name).tobytes() == value.tobytes(), name


def test_one_that_is_not_finite_fails_alone(tiny: Bench) -> None:
    pictures = [(seed, 6, "ddim", 5.0, 0) for seed in range(4)]
    drawings = [tiny.drawing(*picture) for picture in pictures]
    drawings[2] = replace(drawings[2], prompt=np.full_like(drawings[2].prompt, np.nan))
    batcher = tiny.batcher()
    tickets = [batcher.submit(drawing) for drawing in drawings]
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
    tickets = [batcher.submit(tiny.drawing(seed, 5, "euler", 5.0, 0)) for seed in range(3)]
    while not all(ticket.future.done() for ticket in tickets):
        batcher.turn()
    for ticket in tickets:
        with pytest.raises(SafetyEngineError, match="engine 'step' raised in step 3: out of memory"):
            ticket.future.result()
    after = batcher.submit(tiny.drawing(1, 5, "euler", 5.0, 0))
    while not after.future.done():
        batcher.turn()
    assert_same(after.future.result(), tiny.lone(1, 5, "euler", 5.0, 0))


def test_a_free_row_is_taken_in_the_next_step(tiny: Bench) -> None:
    batcher = tiny.batcher()
    tickets = [batcher.submit(tiny.drawing(seed, 2 + seed, "ddim", 5.0, 0)) for seed in range(tiny.manifest.max_batch)]
    last = batcher.submit(tiny.drawing(9, 40, "ddim", 5.0, 0))
    batcher.turn()
    assert [ticket.job.done for ticket in tickets] == [1] * len(tickets) and last.job.done == 0
    batcher.turn()
    assert tickets[0].future.done()
    batcher.turn()
    assert last.job.done == 1


def test_the_group_whose_picture_is_due_first_steps_next(tiny: Bench) -> None:
    batcher = tiny.batcher()
    long = batcher.submit(tiny.drawing(0, 50, "ddim", 5.0, 0))
    short = batcher.submit(tiny.drawing(1, 2, "ddim", 1.0, 0))
    batcher.turn(), batcher.turn()
    assert short.future.done() and long.job.done == 0


def test_past_its_deadline_a_picture_is_not_drawn(tiny: Bench) -> None:
    batcher = tiny.batcher()
    late = batcher.submit(tiny.drawing(0, 50, "ddim", 5.0, 0), deadline=time.monotonic() - 1)
    batcher.turn()
    with pytest.raises(DeadlineError, match="its deadline passed after 0 of 50 steps"):
        late.future.result()


def test_a_full_queue_says_when_to_come_again(tiny: Bench) -> None:
    batcher = tiny.batcher(queue=2)
    for seed in range(2):
        batcher.submit(tiny.drawing(seed, 5, "ddim", 5.0, 0))
    with pytest.raises(QueueFullError, match="2 pictures wait already") as refused:
        batcher.submit(tiny.drawing(3, 5, "ddim", 5.0, 0))
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
    tickets = [batcher.submit(tiny.drawing(seed, 9, "ddim", 5.0, 0)) for seed in range(3)]
    batcher.turn(), batcher.turn()  # a call is bound for either side of the state
    made = list(asked)
    for _ in range(6):
        batcher.turn()
    assert asked == made and "move" not in made
    assert [ticket.job.done for ticket in tickets] == [8, 8, 8]
