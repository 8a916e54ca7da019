"""Whether a picture is the same alone and in company: patterns of arrivals at random, each result compared to the bit.

`python -m benchmarks.equality --patterns 200 --threads 1 2` lets 1 to 12 requests of 1 to 50 steps, of every sampler, guided
and not, under three policies, come at random turns, and cancels some of them. A picture that differs ends it with an error.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from typing import Any

import numpy as np
from hypothesis import Phase, given, seed, settings
from hypothesis import strategies as st
from rich.console import Console
from rich.progress import Progress

from benchmarks.report import environment, save
from saferedir.engines.errors import CancelledError
from saferedir.runtime import Pipeline
from saferedir.runtime.batcher import Batcher
from saferedir.runtime.job import Denoised, Drawing
from saferedir.runtime.policy import SafetyPolicy, resolve
from saferedir.runtime.schedulers import SCHEDULERS, make_schedule
from saferedir.runtime.ticket import Ticket

MOST_STEPS, MOST_REQUESTS = 50, 12
#: Seed, steps, sampler, guidance, and the number of its policy.
Picture = tuple[int, int, str, float, int]
#: Turn of arrival, picture, and after how many of its steps it is cancelled, if at all.
Arrival = tuple[int, Picture, int | None]
PICTURES = st.tuples(
    st.integers(0, 30), st.integers(1, MOST_STEPS), st.sampled_from(tuple(SCHEDULERS)), st.sampled_from([1.0, 3.0, 7.5]),
    st.integers(0, 2),
)  # fmt: skip
ARRIVALS = st.lists(
    st.tuples(st.integers(0, 60), PICTURES, st.one_of(st.none(), st.integers(0, 40))), min_size=1, max_size=MOST_REQUESTS
)


class StillBatcher(Batcher):
    """Without a thread: whoever has it takes its turns."""

    def draw(self, drawing: Drawing, **options: Any) -> Ticket:
        (ticket,) = self.reserve(drawing.engine, drawing.steps, **options)
        self.submit([ticket], [drawing])
        return ticket

    def _start(self) -> None:
        pass


class Bench:
    """A bundle, pictures to draw with it, and what each is alone."""

    def __init__(self, pipeline: Pipeline) -> None:
        self.pipeline, self.manifest = pipeline, pipeline.manifest
        names = [concept.name for concept in self.manifest.safety.concepts]
        usual = SafetyPolicy()
        always = SafetyPolicy(thresholds=dict.fromkeys(names, 0.0), cooldown=1)
        one = SafetyPolicy(enabled=names[:1], cooldown=0)
        self.policies = [resolve(policy, self.manifest.safety) for policy in (usual, always, one)]
        self.alone: dict[Picture, Denoised] = {}
        #: Pictures that were equal and their steps, pictures that were cancelled, and turns and the rows of all turns.
        self.seen = Counter[str]()

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

    def batcher(self, **options: Any) -> StillBatcher:
        return StillBatcher(self.pipeline.backend, self.manifest, **options)

    def lone(self, *picture: Any) -> Denoised:
        if picture not in self.alone:
            batcher = self.batcher()
            ticket = batcher.draw(self.drawing(*picture))
            while not ticket.future.done():
                batcher.turn()
            self.alone[picture] = ticket.future.result()
        return self.alone[picture]

    def check(self, arrivals: list[Arrival]) -> None:
        """Draw these together, and compare each with its lone run.

        Raises:
            AssertionError: one differs.
        """
        batcher = self.batcher()
        tickets: list[tuple[Ticket, Picture, int | None]] = []
        waiting, turn = sorted(arrivals, key=lambda arrival: arrival[0]), 0
        while waiting or not all(ticket.future.done() for ticket, _, _ in tickets):
            while waiting and waiting[0][0] <= turn:
                _, picture, cancelled = waiting.pop(0)
                tickets.append((batcher.draw(self.drawing(*picture)), picture, cancelled))
            for ticket, _, cancelled in tickets:
                if cancelled is not None and ticket.done >= cancelled:
                    ticket.cancel()
            batcher.turn()
            turn += 1
            self.seen["rows"] += batcher.running
            self.seen["turns"] += 1
        for ticket, picture, cancelled in tickets:
            if cancelled is not None and cancelled < picture[1]:
                assert isinstance(ticket.future.exception(), CancelledError)
                assert ticket.done == cancelled
                self.seen["cancelled"] += 1
                continue
            assert_same(ticket.future.result(), self.lone(*picture))
            self.seen["equal"] += 1
            self.seen["steps"] += picture[1]


def assert_same(found: Denoised, expected: Denoised) -> None:
    """The last latent, and every score, firing, cooldown and mask, are the same to the bit."""
    for name, value in vars(expected).items():
        assert getattr(found, name).tobytes() == value.tobytes(), name


def measure(patterns: int, threads: int, first: int) -> dict[str, Any]:
    """What was found equal in so many patterns of arrivals of the embedded model.

    Raises:
        AssertionError: a picture differs.
    """
    bench, began = Bench(Pipeline.from_bundle(backend="ort-cpu", threads=threads)), time.monotonic()
    with Progress() as progress:
        bar = progress.add_task(f"{threads} threads", total=patterns)

        @seed(first)
        @given(ARRIVALS)
        @settings(max_examples=patterns, deadline=None, database=None, phases=[Phase.generate])
        def check(arrivals: list[Arrival]) -> None:
            bench.check(arrivals)
            progress.advance(bar)

        check()
    seconds = time.monotonic() - began
    return {"threads": threads, "patterns": patterns, **bench.seen, "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--patterns", type=int, default=200, help="of arrivals, for each number of threads")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rows = [measure(options.patterns, threads, options.seed) for threads in options.threads]
    Console().print(environment()["machine"], rows)
    print(save("equality", {"seed": options.seed, "rows": rows}))


if __name__ == "__main__":
    main()
