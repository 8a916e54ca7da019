"""A service under mixed load for as long as is asked: every picture that was asked for ends in one record, memory stays flat.

`python -m benchmarks.serving.soak --seconds 3600` sends an open loop of requests that are drawn, streamed, refused, late, too
many, or left by their client, and compares what was answered with the audit. Memory and descriptors are those of the worker.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from rich.console import Console
from rich.progress import Progress

from benchmarks.report import environment, save
from benchmarks.serving.served import running, worker_of
from saferedir.runtime.serve.audit import Audit

PROMPTS = ("a church next to a cat", "a dog on blue", "a castle in ink style", "a red balloon", "two swords", "a boat")
#: Share of requests by what is done with them.
KINDS = {"drawn": 0.45, "several": 0.1, "streamed": 0.15, "left": 0.15, "late": 0.05, "bad": 0.1}
#: Seconds between two looks at the worker, and after which memory is taken for settled.
LOOK, SETTLED = 1.0, 20.0
#: After how many seconds a client leaves.
PATIENCE = (0.05, 0.3)


async def soak(
    folder: Path, seconds: float, rate: float, seed: int, *arguments: str, patience: tuple[float, float] = PATIENCE
) -> dict[str, Any]:
    """`rate` requests a second for so many `seconds`: what was asked for, answered and recorded, and what the worker held."""
    rng, asked, answered = np.random.default_rng(seed), Counter[str](), Counter[str]()
    with running(folder, *arguments) as (process, address):
        worker = worker_of(process.pid)
        looks: list[tuple[float, float, int]] = []
        began, waiting = time.monotonic(), set[asyncio.Task[None]]()
        async with httpx.AsyncClient(base_url=address, timeout=120, limits=httpx.Limits(max_connections=None)) as client:
            with Progress() as progress:
                bar = progress.add_task("soak", total=seconds)
                next_look = began
                while (now := time.monotonic()) < began + seconds:
                    if now >= next_look:
                        looks.append((now - began, _megabytes(worker), len(list(Path(f"/proc/{worker}/fd").iterdir()))))
                        next_look += LOOK
                        progress.update(bar, completed=now - began)
                    kind = str(rng.choice(list(KINDS), p=list(KINDS.values())))
                    task = asyncio.create_task(_ask(client, kind, rng.spawn(1)[0], patience, asked, answered))
                    waiting.add(task)
                    task.add_done_callback(waiting.discard)
                    await asyncio.sleep(float(rng.exponential(1 / rate)))
                await asyncio.gather(*waiting)
        await asyncio.sleep(1)  # the last that was left is recorded
    audit = Audit(f"sqlite:///{folder}/audit.db")
    recorded = Counter(str(record["outcome"]) for record in audit.bodies())
    problems = [vars(problem) for problem in audit.verify()]
    audit.close()
    settled = [look for look in looks if look[0] >= min(SETTLED, seconds / 3)]
    times, memory, files = (np.array(values, float) for values in zip(*settled, strict=True))
    return {
        "seconds": seconds, "rate": rate, "seed": seed, "asked": dict(asked), "answered": dict(answered),
        "recorded": dict(recorded), "problems": problems,
        "memory_mb": {"first": float(memory[0]), "last": float(memory[-1]), "most": float(memory.max())},
        "memory_mb_a_minute": float(60 * np.polyfit(times, memory, 1)[0]),
        "descriptors": {"first": int(files[0]), "last": int(files[-1]), "most": int(files.max())},
    }  # fmt: skip


async def _ask(
    client: httpx.AsyncClient, kind: str, rng: np.random.Generator, patience: tuple[float, float], asked: Counter[str],
    answered: Counter[str],
) -> None:  # fmt: skip
    """One request. `asked` counts pictures that may come to a record, `answered` by what came back."""
    body: dict[str, Any] = {
        "prompt": str(rng.choice(PROMPTS)),
        "steps": int(rng.choice([4, 8, 12])),
        "seed": int(rng.integers(1 << 31)),
    }
    pictures = 3 if kind == "several" else 1
    waits = 60.0
    match kind:
        case "several":
            body["pictures"] = pictures
        case "streamed":
            body["stream"] = True
        case "left":
            body["steps"], waits = 50, float(rng.uniform(*patience))
        case "late":
            body["within"] = 0.01
        case "bad":
            body["steps"] = 0
    if kind != "bad":
        asked[kind] += pictures
    try:
        answer = await client.post("/v1/pictures", json=body, timeout=httpx.Timeout(60, read=waits))
    except httpx.ReadTimeout:
        answered["left"] += pictures
        return
    if answer.headers["content-type"].startswith("text/event-stream"):
        last = json.loads(answer.text.strip().splitlines()[-1].removeprefix("data: "))
        answered["drawn" if last.get("type") == "completed" else str(last["error"]["code"])] += 1
        return
    answered["drawn" if answer.status_code == 200 else str(answer.json()["error"]["code"])] += pictures


def _megabytes(process: int) -> float:
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=3600)
    parser.add_argument("--rate", type=float, default=4, help="requests a second")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures = asyncio.run(soak(Path(folder), options.seconds, options.rate, options.seed))
    Console().print(environment()["machine"], figures)
    print(save("soak", figures))


if __name__ == "__main__":
    main()
