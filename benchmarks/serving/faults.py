"""What becomes of a service when something breaks under it: what was injected, what came back, and whether it recovered.

`python -m benchmarks.serving.faults` prints the table, and writes it with what must be nothing: pictures that left without the
safety's work, and pictures that left without a record.
"""

from __future__ import annotations

import argparse
import os
import signal
import sqlite3
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import httpx
import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sqlalchemy import event

from benchmarks.report import environment, save
from benchmarks.serving.served import Served, command, is_ready, running, served, worker_of
from saferedir.engines import DEFAULT_BUNDLE
from saferedir.engines.bundle import locate
from saferedir.runtime.backend import Backend, BackendAround, Call, Tensors
from saferedir.runtime.serve.audit import Audit

#: Fires in every picture.
PROMPT = "a church next to a cat"
STEPS = 4
#: Steps of a picture that something happens under, and seconds of each.
LONG, STEP_SECONDS = 40, 0.02


class Planted(BackendAround):
    """Another backend, with a fault that comes and goes."""

    fault: str | None = None

    def bind(self, engine: str, inputs: Tensors, outputs: Tensors, rows: int | None = None) -> Call:
        call = super().bind(engine, inputs, outputs, rows)

        def planted() -> None:
            fault = (
                self.fault
                if engine == {"encoder": "text_encoder", "decoder": "vae_decoder"}.get(self.fault or "", "step")
                else None
            )
            if fault in ("raise", "encoder"):
                raise RuntimeError("device lost")
            if fault == "memory":
                raise MemoryError
            if fault == "hang":
                time.sleep(8)
            if fault == "slow":
                time.sleep(STEP_SECONDS)
            call()
            if fault in ("nan", "decoder"):
                name = "next_latent" if fault == "nan" else "image"
                self.backend.write(outputs[name], 0, np.full_like(self.backend.read(outputs[name]), np.nan))

        return planted


@dataclass
class Bench:
    """A service that a fault is injected into, and what it has answered since."""

    own: Served
    folder: Path
    planted: Planted
    answers: list[httpx.Response] = field(default_factory=list)

    def ask(self, steps: int = STEPS, **fields: Any) -> httpx.Response:
        answer = self.own.http.post("/v1/pictures", json={"prompt": PROMPT, "steps": steps, "seed": 1, **fields})
        self.answers.append(answer)
        return answer

    def told(self, answer: httpx.Response) -> str:
        code = "a picture" if answer.status_code == 200 else answer.json()["error"]["code"]
        return f"{answer.status_code} {code}"

    def ready(self) -> bool:
        return bool(self.own.http.get("/ready").status_code == 200)

    def recovered(self) -> str:
        """Draws again, by itself."""
        began = time.monotonic()
        self.own.wait_until(self.ready, 30)
        assert self.ask().status_code == 200
        return f"draws again after {time.monotonic() - began:.1f} s"

    @property
    def pictures(self) -> list[dict[str, Any]]:
        return [own for answer in self.answers if answer.status_code == 200 for own in answer.json()["pictures"]]

    @property
    def unprotected(self) -> int:
        """Pictures that left and were not redirected."""
        return sum(picture["redirected"] != ["church"] for picture in self.pictures)

    @property
    def gaps(self) -> int:
        """Pictures that left without a record, and whatever is wrong with the chain."""
        known = {record["id"] for record in self.own.records()}
        return sum(picture["id"] not in known for picture in self.pictures) + len(list(self.own.audit.verify()))


@contextmanager
def bench(folder: Path, **flags: Any) -> Iterator[Bench]:
    planted: list[Planted] = []

    def plant(backend: Backend) -> Backend:
        planted.append(Planted(backend))
        return planted[0]

    with served(folder, change=plant, **flags) as own:
        yield Bench(own, folder, planted[0])


Row = tuple[str, str, str]
#: What a fault's function is given, and gives: what came back, and how it recovered.
Inject = Callable[[Bench], tuple[str, str]]


def _engine(fault: str) -> Inject:
    def inject(bench: Bench) -> tuple[str, str]:
        bench.planted.fault = fault
        answer, ready = bench.ask(), bench.ready()
        bench.planted.fault = None
        assert answer.status_code == 500 and not ready
        return f"{bench.told(answer)}; not ready", bench.recovered()

    return inject


def _hang(bench: Bench) -> tuple[str, str]:
    bench.planted.fault = "hang"
    began = time.monotonic()
    answer = bench.ask(within=1.0)
    seconds = time.monotonic() - began
    bench.planted.fault = None
    assert answer.status_code in (500, 504) and seconds < 8
    return f"{bench.told(answer)} after {seconds:.1f} s; the deadline was 1 s", bench.recovered()


def _audit_hangs(bench: Bench) -> tuple[str, str]:
    audit, free = bench.own.service.audit, threading.Event()
    append = audit.append

    def waits(entries: Any) -> None:
        free.wait(30)
        append(entries)

    with patch.object(audit, "append", waits), patch("saferedir.runtime.serve.service.WRITE_SECONDS", 1.0):
        answer, ready = bench.ask(), bench.ready()
        refused = bench.ask()
        free.set()
    assert answer.status_code == refused.status_code == 503 and not ready
    return f"{bench.told(answer)} after 1 s; not ready", bench.recovered()


def _file(change: Callable[[Path], None]) -> Inject:
    def inject(bench: Bench) -> tuple[str, str]:
        before = bench.ask().json()["pictures"][0]["b64_json"]
        change(Path(bench.own.settings.bundle) / "safety.safetensors")
        answer = bench.ask()
        same = answer.json()["pictures"][0]["b64_json"] == before
        assert same
        check = subprocess.run(command("serve", bench.own.settings.bundle, "--check"), capture_output=True, text=True)
        assert check.returncode == 3
        return f"{bench.told(answer)}, the same to the byte: what was hashed is in memory", "does not start anew: exit 3"

    return inject


def _disk_full(bench: Bench) -> tuple[str, str]:
    engine, limits = bench.own.audit._engine, [0]

    def limit(connection: sqlite3.Connection, *_: Any) -> None:
        connection.execute(f"PRAGMA max_page_count = {limits[0] or 1_000_000_000}")

    event.listen(engine, "checkout", limit)
    limits[0] = 1
    answer, ready = bench.ask(), bench.ready()
    for _ in range(200):  # until the last page is full
        if answer.status_code != 200:
            break
        answer, ready = bench.ask(), bench.ready()
    assert answer.status_code == 503
    limits[0] = 0
    return f"{bench.told(answer)}; {'ready' if ready else 'not ready'}", bench.recovered()


def _database_gone(bench: Bench) -> tuple[str, str]:
    database, away = bench.folder / "audit.db", bench.folder / "away"
    bench.own.audit._engine.dispose()
    away.mkdir()
    for path in bench.folder.glob("audit.db*"):
        os.replace(path, away / path.name)
    database.mkdir()
    answer, ready = bench.ask(), bench.ready()
    assert answer.status_code == 503 and not ready
    database.rmdir()
    for path in away.glob("audit.db*"):
        os.replace(path, bench.folder / path.name)
    return f"{bench.told(answer)}; not ready", bench.recovered()


def _bad_policy(bench: Bench) -> tuple[str, str]:
    path = bench.own.settings.policy
    assert path is not None
    before = bench.own.service.policies.version
    path.write_text('{"version": "2", "concepts": {"church": {"action": "allow"}}}')
    bench.own.wait_until(lambda: bench.own.service.policies.problem)
    answer = bench.ask()
    told = f"{bench.told(answer)} under version {bench.own.service.policies.version}"
    assert bench.own.service.policies.version == before
    path.write_text('{"version": "3"}')
    bench.own.wait_until(lambda: bench.own.service.policies.version == "3")
    assert bench.ask().status_code == 200
    return told, "takes the next good one within 1 s"


def _clock(bench: Bench) -> tuple[str, str]:
    now = time.time
    with patch("saferedir.runtime.serve.service.time.time", lambda: now() - 3600):
        answer = bench.ask()
    assert answer.status_code == 200 and bench.ask().status_code == 200
    return f"{bench.told(answer)}: deadlines go by a clock that is never set", "the chain is in the order of writing"


def _drift(bench: Bench) -> tuple[str, str]:
    for _ in range(120):
        bench.own.service.drift.seen(0.999)
    text = bench.own.http.get("/metrics").text
    index = next(float(line.split()[1]) for line in text.splitlines() if line.startswith("saferedir_score_drift "))
    assert index > bench.own.settings.drift_alarm
    assert bench.ask().status_code == 200
    return f"score_drift {index:.1f}, alarm from {bench.own.settings.drift_alarm:g}; pictures as before", "none is needed"


def _client_gone(bench: Bench) -> tuple[str, str]:
    bench.planted.fault = "slow"
    with suppress(httpx.TimeoutException):
        bench.own.http.post("/v1/pictures", json={"prompt": PROMPT, "steps": LONG}, timeout=0.3)
    bench.own.wait_until(lambda: bench.own.service.batcher.running == 0)
    bench.planted.fault = None
    bench.own.wait_until(bench.own.records)
    assert bench.own.records()[-1]["outcome"] == "cancelled"
    return f"cancelled after {bench.own.records()[-1]['steps_done']} of {LONG} steps", bench.recovered()


def _one_of_many(bench: Bench) -> tuple[str, str]:
    """A request in company, whose batcher's neighbour is cancelled and another is late."""
    alone = bench.ask(LONG).json()["pictures"][0]["b64_json"]
    bench.planted.fault = "slow"
    others = [threading.Thread(target=bench.ask, args=(LONG,), kwargs={"within": 0.1 * n + 0.5}) for n in range(3)]
    for other in others:
        other.start()
    together = bench.ask(LONG).json()["pictures"][0]["b64_json"]
    for other in others:
        other.join()
    bench.planted.fault = None
    assert together == alone
    late = sorted(bench.told(answer) for answer in bench.answers if answer.status_code != 200)
    return f"{', '.join(dict.fromkeys(late))} for those; the neighbour is the same to the byte", bench.recovered()


def _idle_connections(bench: Bench) -> tuple[str, str]:
    import socket

    idle = []
    for _ in range(5000):
        own = socket.socket()
        own.settimeout(5)
        try:
            own.connect(("127.0.0.1", bench.own.settings.port))
        except OSError:
            own.close()
            break
        idle.append(own)
    answer = bench.ask()
    assert answer.status_code == 200
    for own in idle:
        own.close()
    return f"{bench.told(answer)} beside {len(idle)} idle connections", bench.recovered()


@dataclass(frozen=True)
class Fault:
    """One row of the table."""

    injected: str
    inject: Inject
    #: Whether it needs a bundle, or a policy, of its own.
    own_bundle: bool = False
    own_policy: bool = False


def _alter(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


FAULTS = (
    Fault("the safety raises in a step", _engine("raise")),
    Fault("the safety gives NaN", _engine("nan")),
    Fault("the step does not come back for 8 s", _hang),
    Fault("the text encoder raises", _engine("encoder")),
    Fault("the decoder gives NaN", _engine("decoder")),
    Fault("memory is short in a step", _engine("memory")),
    Fault("the safety's file is altered under the service", _file(_alter), own_bundle=True),
    Fault("the safety's file is deleted under the service", _file(Path.unlink), own_bundle=True),
    Fault("the audit's disk is full", _disk_full),
    Fault("the audit's database is gone", _database_gone),
    Fault("the audit's database does not answer", _audit_hangs),
    Fault("the policy's file becomes a bad one", _bad_policy, own_policy=True),
    Fault("the clock is set back by an hour", _clock),
    Fault("scores move away from the calibration's", _drift),
    Fault("the client leaves", _client_gone),
    Fault("three of four requests in a batch pass their deadline", _one_of_many),
    Fault("5,000 connections that say nothing", _idle_connections),
)


def run(fault: Fault, folder: Path) -> dict[str, Any]:
    """One row, in a service of its own."""
    import shutil

    flags: dict[str, Any] = {}
    if fault.own_bundle:
        flags["bundle"] = str(shutil.copytree(locate(DEFAULT_BUNDLE), folder / "bundle"))
    if fault.own_policy:
        flags["policy"] = folder / "policy.json"
        flags["policy"].write_text('{"version": "1"}')
    with bench(folder, **flags) as own:
        came_back, recovery = fault.inject(own)
        return {
            "injected": fault.injected, "came_back": came_back, "recovery": recovery, "answers": len(own.answers),
            "pictures": len(own.pictures), "unprotected": own.unprotected, "gaps": own.gaps,
        }  # fmt: skip


def worker_killed(folder: Path) -> dict[str, Any]:
    """The worker is killed under a request; its parent starts another."""
    with running(folder) as (process, address):
        done = httpx.post(f"{address}/v1/pictures", json={"prompt": PROMPT, "steps": STEPS}, timeout=60)
        lost: list[str] = []

        def ask() -> None:
            try:
                httpx.post(f"{address}/v1/pictures", json={"prompt": PROMPT, "steps": 50, "pictures": 8}, timeout=60)
            except httpx.HTTPError as error:
                lost.append(type(error).__name__)

        asking = threading.Thread(target=ask)
        asking.start()
        time.sleep(0.5)
        os.kill(worker_of(process.pid), signal.SIGKILL)
        asking.join()
        began = time.monotonic()
        while not is_ready(address):
            assert time.monotonic() < began + 60
            time.sleep(0.05)
        seconds = time.monotonic() - began
        again = httpx.post(f"{address}/v1/pictures", json={"prompt": PROMPT, "steps": STEPS}, timeout=60)
        answers = [done, again]
    return _row(
        "the worker is killed under a request", f"the connection ends ({', '.join(lost)}), no picture",
        f"ready again after {seconds:.1f} s, by itself", answers, folder,
    )  # fmt: skip


def drained(folder: Path) -> dict[str, Any]:
    """The service is stopped under a request."""
    with running(folder) as (process, address):
        answers: list[httpx.Response] = []

        def ask() -> None:
            body = {"prompt": PROMPT, "steps": 25, "pictures": 8}
            answers.append(httpx.post(f"{address}/v1/pictures", json=body, timeout=60))

        asking = threading.Thread(target=ask)
        asking.start()
        time.sleep(0.5)
        process.send_signal(signal.SIGTERM)
        asking.join()
        code = process.wait(60)
    (answer,) = answers
    told = f"{answer.status_code}, all {len(answer.json()['pictures'])} pictures"
    return _row("the service is stopped under a request", told, f"it ends after the request, exit {code}", answers, folder)


def _row(injected: str, came_back: str, recovery: str, answers: list[httpx.Response], folder: Path) -> dict[str, Any]:
    audit = Audit(f"sqlite:///{folder}/audit.db")
    known = {record["id"] for record in audit.bodies()}
    pictures = [own for answer in answers for own in answer.json()["pictures"]]
    gaps = sum(own["id"] not in known for own in pictures) + len(list(audit.verify()))
    audit.close()
    return {
        "injected": injected, "came_back": came_back, "recovery": recovery, "answers": len(answers),
        "pictures": len(pictures), "unprotected": sum(own["redirected"] != ["church"] for own in pictures), "gaps": gaps,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as place:
        jobs: list[Callable[[Path], dict[str, Any]]] = [
            *((lambda folder, fault=fault: run(fault, folder)) for fault in FAULTS), worker_killed, drained,
        ]  # fmt: skip
        for number, job in enumerate(track(jobs, description="faults")):
            folder = Path(place) / str(number)
            folder.mkdir()
            rows.append(job(folder))
    table = Table("injected", "what came back", "recovery", "pictures", "unprotected", "gaps")
    for row in rows:
        table.add_row(*(str(row[name]) for name in ("injected", "came_back", "recovery", "pictures", "unprotected", "gaps")))
    Console().print(environment()["machine"], table)
    print(save("faults", {"rows": rows}))


if __name__ == "__main__":
    main()
