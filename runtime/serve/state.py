"""What the application is made of once it is up, and who may use it."""

from __future__ import annotations

import asyncio
import logging
import time

from fastapi import Request

from saferedir.engines.errors import SafeRedirError
from saferedir.runtime.serve.answers import Answers
from saferedir.runtime.serve.asked import Asked, UnderWay
from saferedir.runtime.serve.errors import NO_RETRY, ServiceError, invalid
from saferedir.runtime.serve.keys import KeyInfo, Keys
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

    def __init__(self, settings: Settings, service: Service, keys: Keys, *, numbered: bool = False) -> None:
        """`numbered`: a front gives requests their numbers, and requests of one number have one record."""
        self.settings, self.service, self.keys, self.numbered = settings, service, keys, numbered
        self.answers = Answers()
        self.draining: asyncio.Task[None] | None = None

    @property
    def model(self) -> str:
        """The name of the bundle that is served."""
        return self.service.pipeline.manifest.name

    @property
    def trouble(self) -> str | None:
        """Why no requests should be sent here; None where they should."""
        if self.draining is not None:
            return "draining"
        return None if self.service.fault is None else f"fault: {type(self.service.fault).__name__}"

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
            try:
                await asyncio.to_thread(self.service.policies.reload)
                if self.service.fault is not None and time.monotonic() > tried + RECOVERY_SECONDS:
                    tried = time.monotonic()
                    await asyncio.to_thread(self.service.probe)
                    log.warning("recovered: a protected picture was drawn, and the audit written")
            except SafeRedirError as error:
                log.error("not recovered: %s", error)
            except Exception:
                log.exception("watching failed, and goes on")

    def drain(self) -> asyncio.Task[None]:
        """Take nothing more, and finish what is under way, as long as may be. What is not finished then is cancelled."""
        if self.draining is None:
            self.draining = asyncio.create_task(self._drain())
        return self.draining

    async def _drain(self) -> None:
        if running := list(self.service.requests):
            await asyncio.wait(running, timeout=self.settings.drain_seconds)
        if late := list(self.service.requests.values()):
            log.error("%d requests are not finished after %g s of draining", len(late), self.settings.drain_seconds)
            for request in late:
                request.stop()
            await asyncio.wait(list(self.service.requests), timeout=self.service.grace())

    def limited(self, asked: Asked, *, pictures: str = "pictures", steps: str = "steps") -> Asked:
        """The same. `pictures` and `steps` are the fields that these came by.

        Raises:
            ServiceError: it exceeds what this service draws.
        """
        own = self.settings
        for field, value, most in (
            (steps, asked.steps, own.most_steps), (pictures, asked.pictures, own.most_pictures),
            ("prompt", len(asked.prompt), own.prompt_characters),
            ("negative_prompt", len(asked.negative_prompt or ""), own.prompt_characters),
        ):  # fmt: skip
            if value > most:
                unit = {pictures: "pictures", steps: "steps"}.get(field, "characters")
                raise invalid(f"{field} comes to {value} {unit}; this service takes {most} at most", field)
        return asked

    def number(self, request: Request) -> str | None:
        """The number that a front has given the request; where there is none, clients cannot give one."""
        return request.headers.get(REQUEST_HEADER) if self.numbered else None

    def admit(self, request: Request, asked: Asked, tenant: str, *, unprotected: bool = False) -> UnderWay:
        """The request, with places for its pictures, which its key is charged for.

        Raises:
            ServiceError: the rate of the key is exceeded. Whatever `Service.admit` raises.
        """
        key: KeyInfo | None = getattr(request.state, "key", None)
        if key is not None and (wait := self.keys.wait(key, asked.pictures)):
            headers = {"retry-after": str(max(1, round(wait)))}
            raise ServiceError(429, "rate_limit_error", "rate_limit_exceeded", f"Try again in {wait:.0f} s.", None, headers)
        try:
            return self.service.admit(
                asked, tenant, request_id=request.state.number, number=self.number(request), unprotected=unprotected
            )
        except SafeRedirError:
            if key is not None:
                self.keys.give_back(key, asked.pictures)
            raise

    def check_model(self, name: str | None, status: int = 400) -> None:
        """
        Raises:
            ServiceError: another model is asked for.
        """
        if name is not None and name != self.model:
            message = f"The model {name!r} is not served; expected {self.model!r}."
            raise ServiceError(status, "invalid_request_error", "model_not_found", message, "model", NO_RETRY)


def state_of(request: Request, *, draining: bool = False) -> State:
    """The state of the service, also while it drains if that is asked for.

    Raises:
        ServiceError: the service is starting, or draining.
    """
    state: State | None = request.app.state.own
    if state is None or (state.draining is not None and not draining):
        what = "starting" if state is None else "draining"
        raise ServiceError(503, "server_error", what, f"The service is {what}.", None, {"retry-after": "1"})
    return state


async def caller(request: Request) -> tuple[State, str]:
    """The state of the service, and whose request it is.

    Raises:
        ServiceError: it is not up, or the key is not known.
    """
    own = state_of(request)
    if not own.keys.required:
        return own, ANYONE
    scheme, _, key = request.headers.get("authorization", "").partition(" ")
    info = own.keys.find(key.strip()) if scheme.lower() == "bearer" else None
    if info is None:
        raise ServiceError(401, "invalid_request_error", "invalid_api_key", "The key is missing or not known.", None, NO_RETRY)
    request.state.key = info
    return own, info.tenant
