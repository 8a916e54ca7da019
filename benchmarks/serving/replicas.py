"""Two replicas under Ray Serve, one of which is killed under load: every request is answered once, and recorded once.

`python -m benchmarks.serving.replicas --audit postgresql+psycopg://...` runs six clients of ten requests on a local cluster.
"""

from __future__ import annotations

import argparse
import os
import signal
import threading
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from rich.console import Console

from benchmarks.report import environment, save
from benchmarks.serving.served import free_port
from saferedir.runtime.serve.audit import Audit
from saferedir.runtime.serve.settings import read_settings

CLIENTS, EACH, STEPS = 6, 10, 12
#: After how many answers a replica is killed.
KILLED_AFTER = 15


def kill_one() -> int:
    """Kill a replica as a machine would; its process, which Ray names after it."""
    for place in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            if place.read_bytes().startswith(b"ray::ServeReplica:default:Replica"):
                os.kill(int(place.parent.name), signal.SIGKILL)
                return int(place.parent.name)
    raise RuntimeError("no replica is running")


def replicas(audit: str, bundle: str, seed: int) -> dict[str, Any]:
    """What was answered and recorded of `CLIENTS` times `EACH` requests, while one of two replicas was killed."""
    import ray
    from ray import serve

    from saferedir.runtime.serve.ray import application

    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, configure_logging=False)
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(application(read_settings({"audit": audit, "bundle": bundle, "threads": 1}), replicas=2))
        until = time.monotonic() + 300
        while httpx.get(f"{address}/ready", timeout=60).status_code != 200:
            if time.monotonic() > until:
                raise TimeoutError("the replicas are not ready")
            time.sleep(0.2)
        answers: list[tuple[int, str]] = []
        killed = threading.Event()

        def client(number: int) -> None:
            rng = np.random.default_rng([seed, number])
            with httpx.Client(base_url=address, timeout=300) as own:
                for _ in range(EACH):
                    body = {"prompt": "a church next to a cat", "steps": STEPS, "seed": int(rng.integers(1 << 31))}
                    answer = own.post("/v1/pictures", json=body)
                    id = answer.json()["pictures"][0]["id"] if answer.status_code == 200 else answer.text[:200]
                    answers.append((answer.status_code, id))
                    if len(answers) >= KILLED_AFTER and not killed.is_set():
                        killed.set()
                        kill_one()

        began = time.monotonic()
        threads = [threading.Thread(target=client, args=(number,)) for number in range(CLIENTS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        seconds = time.monotonic() - began
    finally:
        serve.shutdown()
        ray.shutdown()
    own = Audit(audit)
    recorded = [record["id"] for record in own.bodies() if record["outcome"] in ("drawn", "redirected")]
    problems = [vars(problem) for problem in own.verify()]
    own.close()
    return {
        "requests": CLIENTS * EACH, "seconds": seconds, "killed": killed.is_set(),
        "statuses": dict(Counter(str(status) for status, _ in answers)),
        "answered_once": len({id for status, id in answers if status == 200}),
        "recorded": len(recorded), "answered_and_recorded": len(set(recorded) & {id for _, id in answers}),
        "problems": problems,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--audit", required=True, help="PostgreSQL, as a URL")
    parser.add_argument("--bundle", default="emoji-diffusion")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    figures = replicas(options.audit, options.bundle, options.seed)
    Console().print(environment()["machine"], figures)
    print(save("replicas", figures))


if __name__ == "__main__":
    main()
