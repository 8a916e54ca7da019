"""A service to be measured or tested: its application on granian in this process, at a port of its own."""

from __future__ import annotations

import asyncio
import base64
import io
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
from granian.constants import Interfaces
from granian.server.embed import Server
from PIL import Image

from saferedir.runtime.backend import Backend
from saferedir.runtime.serve.app import make_app
from saferedir.runtime.serve.audit import Audit
from saferedir.runtime.serve.keys import Keys
from saferedir.runtime.serve.opening import BACKLOG, CONNECTIONS, allow_connections, open_service
from saferedir.runtime.serve.service import Service
from saferedir.runtime.serve.settings import Settings, read_settings

#: Seconds that a service may take to be ready.
READY_SECONDS = 60.0


class Served:
    """A service that is up."""

    def __init__(self, settings: Settings, service: Service, address: str) -> None:
        self.settings, self.service, self.address = settings, service, address
        self.http = httpx.Client(base_url=address, timeout=60)

    @property
    def audit(self) -> Audit:
        return self.service.audit

    def client(self, key: str = "none", **options: Any) -> openai.OpenAI:
        """The official client."""
        return openai.OpenAI(base_url=f"{self.address}/v1", api_key=key, **options)

    def records(self) -> list[dict[str, Any]]:
        """The bodies of all records of the audit."""
        return list(self.audit.bodies())

    def wait_until(self, what: Callable[[], object], seconds: float = 10) -> None:
        """Until `what` is true."""
        until = time.monotonic() + seconds
        while not what():
            assert time.monotonic() < until, "it never came to be"
            time.sleep(0.005)


@contextmanager
def served(
    folder: Path, *, change: Callable[[Backend], Backend] = lambda backend: backend, audit: str | None = None, **flags: Any
) -> Iterator[Served]:
    """A service of these settings, whose engines run on what `change` makes of its backend; what it writes is in `folder`."""
    settings = read_settings({"audit": audit or f"sqlite:///{folder}/audit.db", "port": free_port(), "threads": 1, **flags})
    opened: list[Service] = []

    def opening(own: Settings) -> tuple[Service, Keys]:
        service, keys = open_service(own)
        service.batcher.backend = service.pipeline.backend = change(service.pipeline.backend)
        opened.append(service)
        return service, keys

    allow_connections()
    address = f"http://127.0.0.1:{settings.port}"
    server = Server(
        make_app(settings, opening), address="127.0.0.1", port=settings.port, interface=Interfaces.ASGI, log_enabled=False,
        backlog=BACKLOG, backpressure=CONNECTIONS,
    )  # fmt: skip
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=lambda: loop.run_until_complete(server.serve()), daemon=True)
    thread.start()
    try:
        until = time.monotonic() + READY_SECONDS
        while not is_ready(address):
            assert time.monotonic() < until and thread.is_alive(), "the service is not ready"
            time.sleep(0.02)
        own = Served(settings, opened[0], address)
        yield own
        own.http.close()
    finally:
        loop.call_soon_threadsafe(server.stop)
        thread.join(30)


def is_ready(address: str) -> bool:
    """Whether requests should be sent there."""
    try:
        return bool(httpx.get(f"{address}/ready", timeout=5).status_code == 200)
    except httpx.HTTPError:
        return False


def picture(data: str) -> Image.Image:
    """Of base64."""
    return Image.open(io.BytesIO(base64.b64decode(data)))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def command(*arguments: str) -> list[str]:
    """`saferedir` with these arguments."""
    return [sys.executable, "-c", "from saferedir.runtime.command_line.entry import main; main()", *arguments]


@contextmanager
def running(folder: Path, *arguments: str) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """`saferedir serve` as it is run, in processes of its own, once it is ready."""
    port = free_port()
    with (folder / "serve.log").open("wb") as log:
        process = subprocess.Popen(
            command("serve", "--port", str(port), "--audit", f"sqlite:///{folder}/audit.db", *arguments),
            stderr=log, stdout=log,
        )  # fmt: skip
        try:
            address = f"http://127.0.0.1:{port}"
            until = time.monotonic() + 60
            while not is_ready(address):
                assert process.poll() is None and time.monotonic() < until, (folder / "serve.log").read_text()
                time.sleep(0.02)
            yield process, address
        finally:
            process.terminate()
            process.wait(60)


def worker_of(parent: int) -> int:
    """The process that serves, of granian's."""
    return max(map(int, Path(f"/proc/{parent}/task/{parent}/children").read_text().split()))
