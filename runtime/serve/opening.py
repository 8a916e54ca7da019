"""What a service is made of, opened from its settings; and run by granian."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import resource
import signal
import sys
from typing import Any

from fastapi import FastAPI
from sqlalchemy import make_url

from saferedir.engines import Bundle, open_bundle
from saferedir.engines.errors import MissingDependencyError, RequestError
from saferedir.runtime.backends import make_backend
from saferedir.runtime.pipeline import Pipeline
from saferedir.runtime.serve.app import make_app
from saferedir.runtime.serve.audit import Audit
from saferedir.runtime.serve.keys import Keys
from saferedir.runtime.serve.policies import ANYONE, Policies
from saferedir.runtime.serve.service import GRACE_SECONDS, WRITE_SECONDS, Service
from saferedir.runtime.serve.settings import Settings, read_settings
from saferedir.runtime.serve.state import State
from saferedir.runtime.serve.tracing import Tracing

#: Pictures drawn at once on a CPU: more draw little more a second, and slow each other.
CPU_ROWS = 4
#: Seconds of a client that sends its headers slowly.
HEADER_SECONDS = 30
#: Connections that may be open, most of which say nothing for a while; and such that wait to be accepted.
CONNECTIONS, BACKLOG = 16_384, 2048


def open_service(settings: Settings) -> tuple[Service, Keys]:
    """Bundle, engines, policy, audit and keys.

    Raises:
        SafeRedirError: something cannot be used; the message names it.
    """
    bundle, keys, policies, audit = _opened(settings)
    backend = make_backend(bundle, settings.backend, threads=settings.threads, shared=True)
    rows = settings.rows or (CPU_ROWS if backend.name == "ort-cpu" else None)
    pipeline = Pipeline(bundle, backend, queue=settings.queue, rows=rows)
    tracing = Tracing.to(settings.trace_to)
    own = {"seconds": settings.seconds, "tracing": tracing, "log_prompts": settings.log_prompts}
    return Service(pipeline, policies, audit, **own), keys  # type: ignore[arg-type]


def check(settings: Settings) -> dict[str, Any]:
    """What would be in force, without loading an engine.

    Raises:
        SafeRedirError: something cannot be used; the message names it.
    """
    bundle, _, policies, audit = _opened(settings)
    audit.append([])
    audit.close()
    promise = bundle.manifest.safety.promise
    return {
        "settings": {**settings.model_dump(mode="json"), "audit": make_url(settings.audit).render_as_string()},
        "bundle": bundle.manifest.name,
        "bundle_digest": bundle.digest,
        "promise": None if promise is None else str(promise),
        "policy": policies.version,
        "actions": dict(policies.of(ANYONE).actions),
    }


def _opened(settings: Settings) -> tuple[Bundle, Keys, Policies, Audit]:
    bundle = open_bundle(settings.bundle, digest=settings.bundle_digest)
    most = bundle.manifest.max_batch
    if settings.rows is not None and settings.rows > most:
        raise RequestError(
            f"setting rows is {settings.rows}; the engines of {bundle.manifest.name} draw {most} at once at most"
        )
    rows = settings.rows or min(CPU_ROWS, most)  # a card has more
    if settings.queue + rows < settings.most_pictures:
        room = f"only {rows} are sure to be drawn at once (rows), and {settings.queue} may wait (queue)"
        raise RequestError(f"a request may be of {settings.most_pictures} pictures (most_pictures), but {room}")
    keys, policies = Keys(settings.keys), Policies(bundle.manifest.safety, settings.policy)
    audit = Audit(settings.audit, key=settings.audit_key.get_secret_value().encode(), keep_prompts=settings.keep_prompts)
    return bundle, keys, policies, audit


def application() -> FastAPI:
    """The application of this process's environment, as granian calls it."""
    allow_connections()
    settings = read_settings({})
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    logging.getLogger("saferedir").setLevel(settings.log_level.upper())
    return make_app(settings, open_service, on_start=_started)


def _started(state: State | None) -> None:
    """Of a worker: what cannot start ends, to be begun again; what has started drains from the first signal to stop on."""
    if state is None:
        logging.shutdown()
        os._exit(1)
    loop, own = asyncio.get_running_loop(), state

    def stopped(*_: object) -> None:
        loop.call_soon_threadsafe(own.drain)

    for number in (signal.SIGTERM, signal.SIGINT):  # the loop calls granian's own handler as well, which waits for connections
        signal.signal(number, stopped)


def allow_connections() -> None:
    """Let this process have as many files open as it may."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def serve(settings: Settings) -> None:
    """Serve until it is stopped, by one worker that owns the engines.

    Raises:
        MissingDependencyError: granian is not installed.
        RequestError: nothing can listen at the address.
    """
    try:
        from granian import Granian
        from granian.constants import Interfaces
        from granian.http import HTTP1Settings
    except ImportError as error:
        raise MissingDependencyError(f"serving needs the package {error.name}; install saferedir[serve]") from error
    server = Granian(
        "saferedir.runtime.serve.opening:application",
        address=settings.host,
        port=settings.port,
        interface=Interfaces.ASGI,
        factory=True,
        workers=1,
        log_access=False,
        respawn_failed_workers=True,
        backlog=BACKLOG,
        backpressure=CONNECTIONS,
        workers_kill_timeout=math.ceil(settings.drain_seconds + WRITE_SECONDS + 2 * GRACE_SECONDS),
        http1_settings=HTTP1Settings(header_read_timeout=HEADER_SECONDS * 1000),
    )
    try:
        server.serve()
    except OSError as error:
        raise RequestError(f"nothing can listen at {settings.host}:{settings.port}: {error.strerror}") from error
