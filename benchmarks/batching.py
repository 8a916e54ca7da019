"""Traces of requests, drawn one at a time, in static batches, by two workers of one thread, and by the batcher.

Requests arrive by an open loop: a Poisson process at stated shares of what is drawn one at a time. Their numbers of steps are
mixed. `python -m benchmarks.batching` prints, for each way, throughput when everything waits already, and latency at
each load; what a request alone costs; and how well the batcher knows when it will draw what, where more comes than it can draw.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from queue import SimpleQueue
from threading import Thread
from typing import Any, Protocol

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.report import environment, save
from saferedir.engines.errors import QueueFullError
from saferedir.runtime import Pipeline
from saferedir.runtime.batcher import Batcher
from saferedir.runtime.job import Denoised, Drawing, Job
from saferedir.runtime.rows import Rows
from saferedir.runtime.schedulers import make_schedule
from saferedir.runtime.serve.opening import CPU_ROWS

#: Shares of the capacity of drawing one at a time.
LOADS = (0.5, 0.7, 0.9, 1.2)
STEPS = (4, 8, 12, 20, 25, 30, 50)
GUIDANCES = (3.0, 5.0, 7.5)
#: Pictures of a static batch at most: on a CPU more bring little, and wait longer for the last of them.
STATIC = 8
#: A request is in time within so many times what it takes alone.
IN_TIME = 3.0
#: Of what the batcher draws, and how long a request then waits at most.
OVERLOAD, PATIENCE = 1.5, 10.0
PROMPTS = ("a church next to a cat", "a dog on blue", "a castle in ink style", "a red balloon", "two swords", "a boat")


class Server(Protocol):
    """Draws what it is handed."""

    def submit(self, drawing: Drawing) -> Future[Denoised]: ...


class OneAtATime:
    """In the order of arrival."""

    def __init__(self, pipeline: Pipeline) -> None:
        self._waiting: SimpleQueue[tuple[Drawing, Future[Denoised]]] = SimpleQueue()
        self._pipeline = pipeline
        Thread(target=self._serve, daemon=True).start()

    def submit(self, drawing: Drawing) -> Future[Denoised]:
        future: Future[Denoised] = Future()
        self._waiting.put((drawing, future))
        return future

    def _serve(self) -> None:
        rows = Rows(self._pipeline.backend, self._pipeline.manifest, "step", 1)
        while True:
            drawing, future = self._waiting.get()
            _run(rows, [(drawing, future)])


class StaticBatches(OneAtATime):
    """As many as wait, `most` at most; none enters until the last of them is done."""

    def __init__(self, pipeline: Pipeline, most: int) -> None:
        self._most = most
        super().__init__(pipeline)

    def _serve(self) -> None:
        rows = Rows(self._pipeline.backend, self._pipeline.manifest, "step", self._most)
        while True:
            batch = [self._waiting.get()]
            while len(batch) < self._most and not self._waiting.empty():
                batch.append(self._waiting.get())
            _run(rows, batch)


class TwoWorkers:
    """One thread each, one at a time, from one queue."""

    def __init__(self, pipelines: Sequence[Pipeline]) -> None:
        self._workers = [OneAtATime(pipeline) for pipeline in pipelines]
        for worker in self._workers[1:]:
            worker._waiting = self._workers[0]._waiting

    def submit(self, drawing: Drawing) -> Future[Denoised]:
        return self._workers[0].submit(drawing)


class Ours:
    """The batcher."""

    def __init__(self, pipeline: Pipeline) -> None:
        self._batcher = _batcher(pipeline)

    def submit(self, drawing: Drawing) -> Future[Denoised]:
        tickets = self._batcher.reserve(drawing.engine, drawing.steps)
        self._batcher.submit(tickets, [drawing])
        return tickets[0].future


def _batcher(pipeline: Pipeline) -> Batcher:
    """With as many rows as a service has."""
    rows = CPU_ROWS if pipeline.backend.name == "ort-cpu" else None
    batcher = Batcher(pipeline.backend, pipeline.manifest, capacity=rows)
    batcher.prepare(["step"])
    return batcher


def _run(rows: Rows, batch: Sequence[tuple[Drawing, Future[Denoised]]]) -> None:
    """Draw a batch until its last picture is done."""
    jobs = {Job(drawing): future for drawing, future in batch}
    for job in jobs:
        rows.enter(job)
    while rows.jobs:
        for job, record in rows.step():
            job.take(record)
        for job in [job for job in rows.jobs if job.finished]:
            jobs[job].set_result(rows.denoised(job))
            rows.leave(job)


@dataclass(frozen=True)
class Arrival:
    """One request of a trace."""

    #: Seconds from the start of the trace.
    at: float
    drawing: Drawing
    #: Seconds that it takes alone.
    alone: float


def make_drawings(pipeline: Pipeline, count: int, rng: np.random.Generator) -> list[Drawing]:
    """Requests of mixed steps and guidance, under the bundle's own policy."""
    model, scheduler = pipeline.model, pipeline.manifest.scheduler
    assert scheduler is not None
    embeddings = dict(zip(("", *PROMPTS), pipeline.encode(["", *PROMPTS]), strict=True))
    return [
        Drawing(
            engine="step",
            schedule=make_schedule(scheduler, model.prediction_type, int(rng.choice(STEPS))),
            prompt=embeddings[str(rng.choice(PROMPTS))],
            negative=embeddings[""],
            guidance_scale=float(rng.choice(GUIDANCES)),
            guidance_rescale=0.0,
            policy=pipeline.policy,
            seed=seed,
            size=(model.latent_channels, model.latent_height, model.latent_width),
        )
        for seed in range(count)
    ]


def seconds_a_step(pipeline: Pipeline, drawing: Drawing, times: int = 5) -> float:
    """Of one picture alone: the median of whole drawings, by step."""
    rows, taken = Rows(pipeline.backend, pipeline.manifest, "step", 1), []
    for _ in range(times):
        started = time.perf_counter()
        _run(rows, [(drawing, Future())])
        taken.append((time.perf_counter() - started) / drawing.steps)
    return float(np.median(taken))


@dataclass
class Tally:
    """What one way took, over all rounds of a load."""

    seconds: list[float] = field(default_factory=list)
    in_time: list[bool] = field(default_factory=list)
    whole: float = 0.0

    def add(self, trace: Sequence[Arrival], seconds: Sequence[float], whole: float) -> None:
        self.seconds += seconds
        self.in_time += [own <= IN_TIME * arrival.alone for own, arrival in zip(seconds, trace, strict=True)]
        self.whole += whole

    def figures(self) -> dict[str, float]:
        return {
            "a_second": len(self.seconds) / self.whole, "p50": float(np.quantile(self.seconds, 0.5)),
            "p95": float(np.quantile(self.seconds, 0.95)), "in_time": float(np.mean(self.in_time)),
        }  # fmt: skip


def play(server: Server, trace: Sequence[Arrival], title: str) -> tuple[list[float], float]:
    """Seconds from each request's arrival to its end, whatever the server is doing when it arrives; and those of the whole."""
    started, ends = time.perf_counter(), [0.0] * len(trace)
    futures = []
    for index, arrival in enumerate(track(trace, description=title)):
        time.sleep(max(0.0, started + arrival.at - time.perf_counter()))

        def ended(_: Future[Denoised], index: int = index) -> None:
            ends[index] = time.perf_counter() - started

        future = server.submit(arrival.drawing)
        future.add_done_callback(ended)
        futures.append(future)
    for future in futures:
        future.result()
    return [end - arrival.at for end, arrival in zip(ends, trace, strict=True)], max(ends)


def lone_seconds(pipeline: Pipeline, drawing: Drawing, times: int = 9) -> dict[str, float]:
    """A request that comes when nobody else is there, by way: the median."""
    servers: dict[str, Server] = {"one at a time": OneAtATime(pipeline), "batcher": Ours(pipeline)}
    taken: dict[str, list[float]] = {name: [] for name in servers}
    for _ in range(times):
        for name, server in servers.items():
            started = time.perf_counter()
            server.submit(drawing).result()
            taken[name].append(time.perf_counter() - started)
    return {name: float(np.median(own)) for name, own in taken.items()}


def admission(pipeline: Pipeline, requests: int, a_second: float, seed: int) -> dict[str, Any]:
    """`OVERLOAD` times what the batcher draws: how soon a request is refused, and how right predictions are."""
    batcher, rng = _batcher(pipeline), np.random.default_rng([seed, 2])
    drawings, gaps = make_drawings(pipeline, requests, rng), rng.exponential(1 / (OVERLOAD * a_second), requests)
    started, refused, admitted = time.monotonic(), list[float](), list[tuple[float, Any, list[float]]]()
    for at, drawing in zip(track(np.cumsum(gaps), description="more than can be drawn"), drawings, strict=True):
        time.sleep(max(0.0, started + float(at) - time.monotonic()))
        came, ended = time.monotonic(), list[float]()
        try:
            (ticket,) = batcher.reserve(drawing.engine, drawing.steps, deadline=came + PATIENCE)
        except QueueFullError:
            refused.append(time.monotonic() - came)
            continue
        ticket.future.add_done_callback(lambda _, ended=ended: ended.append(time.monotonic()))  # type: ignore[misc]
        batcher.submit([ticket], [drawing])
        admitted.append((came, ticket, ended))
    late = 0
    for _, ticket, _ in admitted:
        late += ticket.future.exception() is not None
    drawn = [
        (ticket.predicted - came, ended[0] - came) for came, ticket, ended in admitted if ticket.future.exception() is None
    ]
    ratio = np.array([true / predicted for predicted, true in drawn])
    return {
        "overload": OVERLOAD, "patience_s": PATIENCE, "requests": len(drawings), "refused": len(refused),
        "refused_after_ms": {"median": 1e3 * float(np.median(refused)), "most": 1e3 * max(refused)} if refused else None,
        "admitted": len(admitted), "late": late, "within_20_percent": float(np.mean(np.abs(ratio - 1) <= 0.2)),
        "true_over_predicted": [float(value) for value in np.quantile(ratio, [0.025, 0.5, 0.975])],
    }  # fmt: skip


def measure(requests: int, rounds: int, seed: int) -> dict[str, Any]:
    """By way: what is drawn in a second when all wait from the start, and latency at each load.

    Ways take turns, and every round of a load measures anew what a request takes alone: other users of a machine change that.
    """
    pipeline = Pipeline.from_bundle()
    lone = [Pipeline.from_bundle(threads=1) for _ in range(2)]
    ways: dict[str, Server] = {
        "one at a time": OneAtATime(pipeline),
        f"static batches of {STATIC}": StaticBatches(pipeline, STATIC),
        "two workers of one thread": TwoWorkers(lone),
        "batcher": Ours(pipeline),
    }
    tallies = {(load, way): Tally() for load in (None, *LOADS) for way in ways}
    steps: list[float] = []
    for turn in range(rounds):
        for load in (None, *LOADS):
            rng = np.random.default_rng([seed, turn, round(10 * (load or 0))])
            drawings = make_drawings(pipeline, requests, rng)
            steps.append(seconds_a_step(pipeline, drawings[0]))
            alone = [drawing.steps * steps[-1] for drawing in drawings]
            gaps = rng.exponential(float(np.mean(alone)) / load, requests) if load else np.zeros(requests)
            trace = [Arrival(*own) for own in zip(map(float, np.cumsum(gaps)), drawings, alone, strict=True)]
            for way in sorted(ways, key=lambda way: (list(ways).index(way) + turn) % len(ways)):
                said = f"round {turn + 1} of {rounds}, {'all at once' if load is None else f'{load:g} of capacity'}, {way}"
                tallies[load, way].add(trace, *play(ways[way], trace, said))
    rows: list[dict[str, Any]] = [{"way": way, "load": load, **tally.figures()} for (load, way), tally in tallies.items()]
    (ours,) = (row for row in rows if row["way"] == "batcher" and row["load"] is None)
    return {
        "requests": requests, "rounds": rounds, "seed": seed, "seconds_a_step_alone": steps, "rows": rows,
        "lone_seconds": lone_seconds(pipeline, drawings[0]),
        "admission": admission(pipeline, rounds * requests, ours["a_second"], seed),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=50, help="of each trace")
    parser.add_argument("--rounds", type=int, default=3, help="traces of each load and way")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    figures = measure(options.requests, options.rounds, options.seed)
    table = Table("load", "way", "a second", "median s", "95 % s", f"within {IN_TIME:g}x alone")
    for row in figures["rows"]:
        load = "all at once" if row["load"] is None else f"{row['load']:g}"
        table.add_row(
            load,
            row["way"],
            f"{row['a_second']:.2f}",
            f"{row['p50']:.2f}",
            f"{row['p95']:.2f}",
            f"{100 * row['in_time']:.0f} %",
        )
    Console().print(environment()["machine"], table, figures["lone_seconds"], figures["admission"])
    print(save("batching", figures))


if __name__ == "__main__":
    main()
