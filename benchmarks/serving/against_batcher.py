"""What the service costs beside its batcher: one trace, handed to the batcher itself and sent over HTTP.

`python -m benchmarks.serving.against_batcher` prints pictures a second when all is there from the start, the 95th percentile of
latency at half of that, and how soon a service that was just begun has drawn its first picture.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.report import environment, save
from benchmarks.serving.served import running
from saferedir.runtime import Pipeline

PROMPTS = ("a church next to a cat", "a dog on blue", "a castle in ink style", "a red balloon", "two swords", "a boat")
STEPS = (4, 8, 12, 20, 25)
STARTS = 5
Draw = Callable[[dict[str, Any]], Awaitable[object]]


def trace(requests: int, rate: float | None, seed: int) -> list[tuple[float, dict[str, Any]]]:
    """When each request arrives, in seconds, and what it is; all at once where there is no rate."""
    rng = np.random.default_rng(seed)
    at = np.zeros(requests) if rate is None else np.cumsum(rng.exponential(1 / rate, requests))
    return [
        (float(when), {"prompt": str(rng.choice(PROMPTS)), "steps": int(rng.choice(STEPS)), "seed": number})
        for number, when in enumerate(at)
    ]


async def play(draw: Draw, requests: list[tuple[float, dict[str, Any]]]) -> tuple[float, list[float]]:
    """Seconds until all are drawn, and of each from its arrival on."""
    began, latencies = time.perf_counter(), [0.0] * len(requests)

    async def one(index: int, at: float, body: dict[str, Any]) -> None:
        await asyncio.sleep(max(0.0, began + at - time.perf_counter()))
        await draw(body)
        latencies[index] = time.perf_counter() - began - at

    await asyncio.gather(*(one(index, at, body) for index, (at, body) in enumerate(requests)))
    return time.perf_counter() - began, latencies


async def bare(requests: list[tuple[float, dict[str, Any]]]) -> tuple[float, list[float]]:
    """Encoded, drawn by the batcher and decoded, with nothing around it."""
    pipeline = Pipeline.from_bundle()
    pipeline.batcher.prepare(["step"])

    async def draw(body: dict[str, Any]) -> object:
        plan = pipeline.plan(body["prompt"], num_inference_steps=body["steps"], seed=body["seed"])
        drawings = await asyncio.to_thread(pipeline.drawings, plan, plan.requests)
        tickets = pipeline.batcher.reserve(plan.engine, body["steps"])
        pipeline.batcher.submit(tickets, drawings)
        done = await asyncio.wrap_future(tickets[0].future)
        return await asyncio.to_thread(pipeline.finish, plan, [done])

    return await play(draw, requests)


async def served(requests: list[tuple[float, dict[str, Any]]]) -> tuple[float, list[float]]:
    """Over HTTP, with audit and all."""
    with tempfile.TemporaryDirectory() as folder, running(Path(folder), "--queue", "1000") as (_, address):
        async with httpx.AsyncClient(base_url=address, timeout=600, limits=httpx.Limits(max_connections=None)) as client:

            async def draw(body: dict[str, Any]) -> object:
                answer = await client.post("/v1/pictures", json={**body, "within": 600})
                return answer.raise_for_status()

            return await play(draw, requests)


def first_picture() -> float:
    """Seconds from the command `saferedir serve` to a protected picture of 25 steps in a client's hands."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, running(Path(folder)) as (_, address):
        httpx.post(f"{address}/v1/pictures", json={"prompt": PROMPTS[0]}, timeout=60).raise_for_status()
        return time.perf_counter() - began


def measure(requests: int, seed: int) -> dict[str, Any]:
    """Both, at all at once and at half of what the batcher then draws."""
    at_once = trace(requests, None, seed)
    taken = {"batcher": asyncio.run(bare(at_once))[0], "service": asyncio.run(served(at_once))[0]}
    rate = requests / taken["batcher"] / 2
    half = trace(requests, rate, seed)
    p95 = {name: float(np.quantile(asyncio.run(way(half))[1], 0.95)) for name, way in (("batcher", bare), ("service", served))}
    return {
        "requests": requests, "seed": seed, "a_second": {name: requests / own for name, own in taken.items()},
        "half_load": rate, "p95_at_half_load": p95, "first_picture_s": [first_picture() for _ in range(STARTS)],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=150)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    figures = measure(options.requests, options.seed)
    table = Table("way", "pictures a second", "95 % within, at half of it")
    for name, own in figures["a_second"].items():
        table.add_row(name, f"{own:.2f}", f"{figures['p95_at_half_load'][name]:.3f} s")
    first = f"first picture after {np.median(figures['first_picture_s']):.2f} s, the median of {STARTS} starts"
    Console().print(environment()["machine"], table, first)
    print(save("service", figures))


if __name__ == "__main__":
    main()
