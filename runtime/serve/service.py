"""A picture's way through a service: planned under its tenant's policy, drawn in company, recorded, and only then released."""

from __future__ import annotations

import asyncio
import hashlib
import io
import logging
import secrets
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from typing import Any, Literal

from PIL import Image

from saferedir.engines.errors import (
    AuditError,
    BlockedError,
    BusyError,
    CancelledError,
    DeadlineError,
    RequestError,
    SafeRedirError,
    SafetyError,
)
from saferedir.runtime.batcher import Ticket
from saferedir.runtime.pipeline import Pipeline, Plan
from saferedir.runtime.policy import Tightening
from saferedir.runtime.record import SafetyRecord
from saferedir.runtime.serve.audit import Audit, Entry
from saferedir.runtime.serve.policies import Policies, TenantPolicy

log = logging.getLogger("saferedir")

Outcome = Literal["drawn", "redirected", "blocked", "cancelled", "late", "refused", "failed"]
#: Called with steps done and steps in all, over all pictures of a request; on the batcher's thread.
Progress = Callable[[int, int], None]
#: Called with the number of a picture, and what it looks like so far: a latent [C, h, w]; on the batcher's thread.
Preview = Callable[[int, Any], None]


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What a client asks for."""

    prompt: str
    negative_prompt: str | None = None
    pictures: int = 1
    height: int | None = None
    width: int | None = None
    seed: int | None = None
    steps: int = 25
    guidance_scale: float = 5.0
    guidance_rescale: float = 0.0
    scheduler: str | None = None
    tighten: Tightening | None = None
    #: Seconds from now.
    within: float | None = None
    priority: int = 0
    #: Who asks, as the client names its own users.
    user: str | None = None


@dataclass(frozen=True)
class Drawn:
    """One picture that may leave."""

    id: str
    image: Image.Image
    record: SafetyRecord
    #: Concepts that were redirected, and such that the policy only observes.
    redirected: list[str]
    observed: list[str]


@dataclass
class _UnderWay:
    """One request: its tickets, and why they were stopped."""

    id: str
    tenant: str
    asked: Asked
    policy: TenantPolicy
    plan: Plan
    began: float
    tickets: list[Ticket] = field(default_factory=list)
    #: Concepts whose firing stopped it.
    blocked: list[str] = field(default_factory=list)

    def stop(self) -> None:
        for ticket in self.tickets:
            ticket.cancel()


class Service:
    """Draws for tenants. Everything of a request that is no step happens off the batcher's thread."""

    def __init__(self, pipeline: Pipeline, policies: Policies, audit: Audit, *, seconds: float) -> None:
        """`seconds` is what a request may take at most."""
        self.pipeline, self.policies, self.audit, self.seconds = pipeline, policies, audit, seconds
        self._models = ThreadPoolExecutor(1, "saferedir-models")
        self._writer = ThreadPoolExecutor(1, "saferedir-audit")
        self.under_way: set[str] = set()
        #: What went wrong with the safety last; None as long as it is sound.
        self.fault: str | None = None

    async def draw(
        self, asked: Asked, tenant: str, *, gone: Awaitable[object] | None = None, progress: Progress | None = None,
        previews: int = 0, preview: Preview | None = None,
    ) -> list[Drawn]:  # fmt: skip
        """All pictures of a request, or none. Where `gone` ends first, the client is, and nothing more is drawn.

        Each is shown to `preview` up to `previews` times while it is drawn, after the decision that saw it.

        Raises:
            RequestError: it cannot be drawn as asked. BusyError: not now, or not in time. BlockedError: the policy refuses it.
            SafetyError, AuditError: the safety or its record failed, and no picture leaves. CancelledError: the client is gone.
        """
        id, began = f"img_{secrets.token_hex(12)}", time.time()
        policy = self.policies.of(tenant)
        plan = self._plan(asked, policy)
        request = _UnderWay(id, tenant, asked, policy, plan, began)
        self.under_way.add(id)
        try:
            drawn = await self._drawn(request, gone, progress, _spread(asked.steps, previews), preview)
        except SafeRedirError as error:
            if isinstance(error, SafetyError):
                self.fault = str(error)
            await self._write([self._entry(request, index, error=error) for index in range(asked.pictures)])
            raise
        finally:
            request.stop()
            self.under_way.discard(id)
        await self._write([self._entry(request, index, drawn=own) for index, own in enumerate(drawn)])
        return drawn

    def _plan(self, asked: Asked, policy: TenantPolicy) -> Plan:
        return self.pipeline.plan(
            asked.prompt,
            negative_prompt=asked.negative_prompt,
            num_images_per_prompt=asked.pictures,
            height=asked.height,
            width=asked.width,
            seed=asked.seed,
            num_inference_steps=asked.steps,
            guidance_scale=asked.guidance_scale,
            guidance_rescale=asked.guidance_rescale,
            scheduler=asked.scheduler,
            tighten=asked.tighten,
            policy=policy.engine,
        )

    async def _drawn(
        self, request: _UnderWay, gone: Awaitable[object] | None, progress: Progress | None, previewed: frozenset[int],
        preview: Preview | None,
    ) -> list[Drawn]:  # fmt: skip
        loop = asyncio.get_running_loop()
        deadline = time.monotonic() + min(self.seconds, request.asked.within or self.seconds)
        drawings = await loop.run_in_executor(self._models, self.pipeline.drawings, request.plan, request.plan.requests)
        stops = [n for n, name in enumerate(request.policy.engine.concepts) if request.policy.actions[name] == "block"]

        def after_step(done: int, total: int) -> None:
            for ticket in request.tickets:
                fired = ticket.job.fired
                if not request.blocked and any(fired[n] for n in stops):
                    request.blocked = [request.policy.engine.concepts[n] for n in stops if fired[n]]
                    request.stop()
            if progress is not None:
                progress(sum(ticket.job.done for ticket in request.tickets), total * len(drawings))

        for index, drawing in enumerate(drawings):
            request.tickets.append(
                self.pipeline.batcher.submit(
                    drawing, priority=request.asked.priority, deadline=deadline, on_step=after_step, previewed=previewed,
                    on_preview=None if preview is None else partial(preview, index),
                )
            )  # fmt: skip
        waiting = asyncio.gather(*(asyncio.wrap_future(ticket.future) for ticket in request.tickets))
        left = None if gone is None else asyncio.ensure_future(gone)
        try:
            await asyncio.wait({waiting} if left is None else {waiting, left}, return_when=asyncio.FIRST_COMPLETED)
            if not waiting.done():
                request.stop()
            done = await waiting
        except CancelledError:
            if not request.blocked:
                raise
        finally:
            if left is not None:
                left.cancel()
        if request.blocked:
            raise BlockedError(request.blocked, max(ticket.job.done for ticket in request.tickets))
        made = await loop.run_in_executor(self._models, self.pipeline.finish, request.plan, done)
        return [
            Drawn(
                f"{request.id}_{index}", image, record,
                request.policy.seen(result.score, "redirect"), request.policy.seen(result.score, "observe"),
            )
            for index, (image, record, result) in enumerate(zip(made.images, made.records, done, strict=True))
        ]  # fmt: skip

    def _entry(
        self, request: _UnderWay, index: int, *, drawn: Drawn | None = None, error: SafeRedirError | None = None
    ) -> Entry:
        asked, plan = request.asked, request.plan
        job = request.tickets[index].job if index < len(request.tickets) else None
        body: dict[str, Any] = {
            "at": datetime.fromtimestamp(request.began, UTC).isoformat(),
            "seconds": round(time.time() - request.began, 3),
            "tenant": request.tenant,
            "user": asked.user,
            "policy": {"version": request.policy.version, "digest": request.policy.digest},
            "bundle": self.pipeline.bundle.digest,
            "seed": plan.requests[index].seed,
            "scheduler": plan.scheduler,
            "steps": asked.steps,
            "guidance_scale": plan.guidance_scale,
            "guidance_rescale": plan.guidance_rescale,
            "negative_prompt": asked.negative_prompt,
            "size": list(plan.size),
            "actions": dict(request.policy.actions),
            "outcome": _outcome(request, drawn, error),
            "steps_done": 0 if job is None else job.done,
            "scores": [] if drawn is None else [list(step.score.values()) for step in drawn.record.steps],
            "fired": [] if drawn is None else [list(step.fired) for step in drawn.record.steps],
            "observed": [] if drawn is None else drawn.observed,
            "blocked": request.blocked,
            "pixels": None if drawn is None else hashlib.sha256(drawn.image.tobytes()).hexdigest(),
            "error": None if error is None else type(error).__name__,
        }
        return Entry(f"{request.id}_{index}", body, asked.prompt)

    async def _write(self, entries: Sequence[Entry]) -> None:
        try:
            await asyncio.get_running_loop().run_in_executor(self._writer, self.audit.append, entries)
        except AuditError as error:
            self.fault = str(error)
            raise


def _outcome(request: _UnderWay, drawn: Drawn | None, error: SafeRedirError | None) -> Outcome:
    if drawn is not None:
        return "redirected" if drawn.redirected else "drawn"
    if request.blocked:
        return "blocked"
    if isinstance(error, DeadlineError):
        return "late"
    if isinstance(error, BusyError | RequestError):
        return "refused"
    return "cancelled" if isinstance(error, CancelledError) else "failed"


def _spread(steps: int, previews: int) -> frozenset[int]:
    """After which steps a picture is shown, spread evenly; never after the last, which ends it."""
    return frozenset(step for part in range(1, previews + 1) if 0 < (step := round(part * steps / (previews + 1))) < steps)


def picture_bytes(image: Image.Image, kind: str, compression: int | None = None) -> bytes:
    """The picture as png, jpeg or webp; `compression` is the quality of the latter two, 0 to 100."""
    buffer = io.BytesIO()
    options: dict[str, Any] = {} if kind == "png" or compression is None else {"quality": compression}
    image.save(buffer, kind.upper(), **options)
    return buffer.getvalue()
