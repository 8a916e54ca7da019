"""What the application is made of once it is up, and who may use it."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any

from fastapi import Request

from saferedir.engines.errors import SafeRedirError
from saferedir.runtime.serve.answers import Answers
from saferedir.runtime.serve.asked import Asked
from saferedir.runtime.serve.bodies import check_limits
from saferedir.runtime.serve.errors import NO_RETRY, ServiceError
from saferedir.runtime.serve.keys import Keys
from saferedir.runtime.serve.policies import ANYONE
from saferedir.runtime.serve.service import Service
from saferedir.runtime.serve.settings import Settings

log = logging.getLogger("saferedir")

#: The number that a front gives a request.
REQUEST_HEADER = "x-saferedir-request"
#: Seconds between looks at the policy's file, and between attempts to recover from a fault.
RELOAD_SECONDS, RECOVERY_SECONDS = 1.0, 2.0


class State:
    """One service, as its application knows it."""

    def __init__(self, settings: Settings, service: Service, keys: Keys) -> None:
        self.settings, self.service, self.keys = settings, service, keys
        self.answers = Answers()
        self.draining = False

    @property
    def model(self) -> str:
        """The name of the bundle that is served."""
        return self.service.pipeline.manifest.name

    @property
    def trouble(self) -> str | None:
        """Why no requests should be sent here; None where they should."""
        if self.draining:
            return "draining"
        return None if self.service.fault is None else f"fault: {self.service.fault}"

    async def watch(self) -> None:
        """Take a changed policy, and try to recover from a fault, for ever."""
        tried, drifted = 0.0, False
        while True:
            await asyncio.sleep(RELOAD_SECONDS)
            index = self.service.drift.index
            if index > self.settings.drift_alarm and not drifted:
                log.warning(
                    "scores have drifted from the calibration's: index %.2f, alarm from %g", index, self.settings.drift_alarm
                )
            drifted = index > self.settings.drift_alarm
            await asyncio.to_thread(self.service.policies.reload)
            if self.service.fault is not None and time.monotonic() > tried + RECOVERY_SECONDS:
                tried = time.monotonic()
                try:
                    await asyncio.to_thread(self.service.probe)
                    log.warning("recovered: a protected picture was drawn, and the audit written")
                except SafeRedirError as error:
                    log.error("not recovered: %s", error)

    async def drain(self) -> None:
        """Finish what is under way, as long as may be."""
        self.draining = True
        until = time.monotonic() + self.settings.drain_seconds
        while self.service.under_way and time.monotonic() < until:
            await asyncio.sleep(0.05)
        for id in self.service.under_way:
            log.error("%s is not finished after %g s of draining", id, self.settings.drain_seconds)

    def limited(self, asked: Asked) -> Asked:
        """The same.

        Raises:
            ServiceError: it exceeds what this service draws.
        """
        own = self.settings
        check_limits(asked, steps=own.most_steps, pictures=own.most_pictures, characters=own.prompt_characters)
        return asked

    def number(self, request: Request) -> str | None:
        """The number that a front has given the request; where there is none, clients cannot give one."""
        return request.headers.get(REQUEST_HEADER) if self.settings.numbered else None

    def check_model(self, name: str | None, status: int = 400) -> None:
        """
        Raises:
            ServiceError: another model is asked for.
        """
        if name is not None and name != self.model:
            message = f"The model {name!r} is not served; expected {self.model!r}."
            raise ServiceError(status, "invalid_request_error", "model_not_found", message, "model", NO_RETRY)


async def caller(request: Request, pictures: int) -> tuple[State, str]:
    """The state of the service, and whose request it is.

    Raises:
        ServiceError: it is not up, the key is not known, or its rate is exceeded.
    """
    state: Any = request.app.state.own
    if state is None or state.draining:
        what = "starting" if state is None else "draining"
        raise ServiceError(503, "server_error", what, f"The service is {what}.", None, {"retry-after": "1"})
    own: State = state
    if not own.keys.required:
        return own, ANYONE
    scheme, _, key = request.headers.get("authorization", "").partition(" ")
    info = own.keys.find(key.strip()) if scheme.lower() == "bearer" else None
    if info is None:
        raise ServiceError(401, "invalid_request_error", "invalid_api_key", "The key is missing or not known.", None, NO_RETRY)
    if wait := own.keys.wait(info, pictures):
        headers = {"retry-after": str(max(1, round(wait)))}
        raise ServiceError(429, "rate_limit_error", "rate_limit_exceeded", f"Try again in {wait:.0f} s.", None, headers)
    return own, info.tenant
