"""What a service is made of, opened from its settings; and run by granian."""

from __future__ import annotations

import os
from pathlib import Path

from fastapi import FastAPI

from saferedir.engines import open_bundle
from saferedir.engines.errors import MissingDependencyError, RequestError
from saferedir.runtime.backends import make_backend
from saferedir.runtime.pipeline import Pipeline
from saferedir.runtime.serve.app import make_app
from saferedir.runtime.serve.audit import Audit
from saferedir.runtime.serve.keys import Keys
from saferedir.runtime.serve.policies import Policies
from saferedir.runtime.serve.service import Service
from saferedir.runtime.serve.settings import Settings, read_settings

#: Where a worker finds its file of settings; its flags are in the environment.
CONFIG_VARIABLE = "SAFEREDIR_SERVE_CONFIG"
#: Seconds of a client that sends its headers slowly.
HEADER_SECONDS = 30


def open_service(settings: Settings) -> tuple[Service, Keys]:
    """Bundle, engines, policy, audit and keys.

    Raises:
        SafeRedirError: something cannot be used; the message names it.
    """
    bundle = open_bundle(settings.bundle, digest=settings.bundle_digest)
    keys, policies = Keys(settings.keys), Policies(bundle.manifest.safety, settings.policy)
    audit = Audit(settings.audit, key=settings.audit_key.get_secret_value().encode(), keep_prompts=settings.keep_prompts)
    pipeline = Pipeline(bundle, make_backend(bundle, settings.backend, threads=settings.threads), queue=settings.queue)
    return Service(pipeline, policies, audit, seconds=settings.seconds), keys


def application() -> FastAPI:
    """The application of this process's environment, as granian calls it."""
    file = os.environ.get(CONFIG_VARIABLE)
    return make_app(read_settings({}, Path(file) if file else None), open_service)


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
        workers_kill_timeout=int(settings.drain_seconds) + 5,
        http1_settings=HTTP1Settings(header_read_timeout=HEADER_SECONDS * 1000),
    )
    try:
        server.serve()
    except OSError as error:
        raise RequestError(f"nothing can listen at {settings.host}:{settings.port}: {error.strerror}") from error
