"""A picture's way through a service: planned under its tenant's policy, drawn in company, recorded, and only then released."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

import numpy as np

from saferedir.engines.errors import (
    AuditError,
    BackendError,
    BlockedError,
    QueueFullError,
    SafeRedirError,
    SafetyError,
    UnresponsiveError,
)
from saferedir.runtime.job import Denoised
from saferedir.runtime.pipeline import Pipeline, Plan
from saferedir.runtime.serve.asked import Asked, Drawn, Progress, UnderWay
from saferedir.runtime.serve.audit import Audit, Entry
from saferedir.runtime.serve.metrics import Drift, Metrics
from saferedir.runtime.serve.policies import Policies, TenantPolicy
from saferedir.runtime.serve.recording import entry, outcome
from saferedir.runtime.serve.tracing import Tracing

log = logging.getLogger("saferedir")

#: A request that has ended waits so long for the step that is under way, or so many times as long as steps take.
GRACE_SECONDS, GRACE_STEPS = 5.0, 3.0
#: What the audit may take to write.
WRITE_SECONDS = 15.0
T = TypeVar("T")
#: Called after every step, on the batcher's thread.
OnProgress = Callable[[Progress], None]
#: Called with the number of a picture, and what it looks like so far: a latent [C, h, w]; on the batcher's thread.
Preview = Callable[[int, Any], None]
#: Makes what ends when the client has left.
Gone = Callable[[], Coroutine[Any, Any, object]]


class Service:
    """Draws for tenants. Everything of a request that is no step happens off the batcher's thread."""

    def __init__(
        self, pipeline: Pipeline, policies: Policies, audit: Audit, *, seconds: float, tracing: Tracing | None = None,
        log_prompts: bool = False,
    ) -> None:  # fmt: skip
        """`seconds` is what a request may take at most."""
        self.pipeline, self.policies, self.audit, self.seconds = pipeline, policies, audit, seconds
        self._tracing, self._log_prompts = tracing or Tracing(), log_prompts
        self.batcher = pipeline.batcher
        promise = pipeline.manifest.safety.promise
        self.drift = Drift(promise.deciles if promise is not None else ())
        self.metrics = Metrics(self.drift, lambda: self.batcher.waiting, lambda: self.batcher.running, self._bad_policy)
        self.batcher.on_turn = self.metrics.turn
        self._models = ThreadPoolExecutor(self.batcher.capacity, "saferedir-models")
        self._writer = ThreadPoolExecutor(1, "saferedir-audit")
        #: Those that are under way; each task ends with the request's record.
        self.requests: dict[asyncio.Task[list[Drawn]], UnderWay] = {}
        #: What went wrong with the safety or its record; None while both are sound.
        self.fault: SafeRedirError | None = None

    def prepare(self) -> None:
        """Load and measure the engines, draw a protected picture, and write to the audit: only then anything is served.

        Raises:
            SafeRedirError: one of these failed.
        """
        model = self.pipeline.model
        self.batcher.prepare(
            [model.engine(name, model.latent_height, model.latent_width) for name in ("step", "step_unguided")]
        )
        self.probe()

    def probe(self) -> None:
        """Draw a protected picture and write to the audit.

        Raises:
            SafeRedirError: one of these failed.
        """
        promise = self.pipeline.manifest.safety.promise
        self.pipeline("a picture", num_inference_steps=1 if promise is None else promise.envelope.steps[0])
        self.audit.append([])
        self.fault = None

    def _bad_policy(self) -> bool:
        return self.policies.problem is not None

    def close(self) -> None:
        """Draw and write nothing more."""
        self.batcher.close()
        self._models.shutdown()
        self._writer.shutdown()
        self.audit.close()

    def admit(
        self, asked: Asked, tenant: str, *, request_id: str = "", number: str | None = None, unprotected: bool = False
    ) -> UnderWay:
        """A request that may be drawn now, with places for its pictures. Requests of one `number` have one record.

        Raises:
            RequestError: it cannot be drawn as asked. QueueFullError: not now, or not in time.
            AuditError: the last record could not be written, and none since.
        """
        if isinstance(self.fault, AuditError):
            raise self.fault
        policy = self.policies.of(tenant)
        if unprotected:
            log.warning("a picture is drawn UNPROTECTED for tenant %r, as the operator's settings allow", tenant)
            policy = policy.switched_off()
        plan = self._plan(asked, policy)
        id, now = f"img_{number or secrets.token_hex(12)}", time.monotonic()
        deadline = now + min(self.seconds, asked.within or self.seconds)
        tightened, again = policy.tightened(plan.policy), number is not None
        request = UnderWay(id, request_id, tenant, asked, tightened, plan, time.time(), deadline, again=again)
        if self._log_prompts:
            log.info("%s of tenant %r: %r", request.id, tenant, asked.prompt)
        try:
            request.tickets = self.batcher.reserve(
                plan.engine, request.steps, asked.pictures, priority=asked.priority, deadline=deadline
            )
        except QueueFullError:  # it has no record, so that nobody fills the audit by asking
            self.metrics.pictures.labels("refused").inc(asked.pictures)
            raise
        return request

    async def draw(
        self, request: UnderWay, *, gone: Gone | None = None, progress: OnProgress | None = None, previews: int = 0,
        preview: Preview | None = None,
    ) -> list[Drawn]:  # fmt: skip
        """All pictures of a request that was admitted, or none. Where `gone` ends first, the client is, and no more is drawn.

        Each is shown to `preview` up to `previews` times while it is drawn, after the decision that saw it.

        Raises:
            DeadlineError: it was late. BlockedError: the policy refuses it. CancelledError: the client is gone.
            SafetyError, AuditError: the safety or its record failed, and no picture leaves.
        """
        task = asyncio.ensure_future(self._draw(request, gone, progress, preview, previews))
        self.requests[task] = request
        task.add_done_callback(lambda done: self.requests.pop(task, None))
        task.add_done_callback(_retrieved)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:  # whoever waited does no longer; the request ends by itself, and is recorded
            request.stop()
            raise

    async def _draw(
        self, request: UnderWay, gone: Gone | None, progress: OnProgress | None, preview: Preview | None, previews: int
    ) -> list[Drawn]:
        about = {"gen_ai__request__choice__count": request.asked.pictures, "saferedir__request": request.id}
        with self._tracing.span(self.pipeline.manifest.name, **about) as tell:
            try:
                drawn = await self._drawn(request, gone, progress, preview, previews)
            except Exception as error:
                self._note(error)
                self._count(request, [])
                tell(saferedir__outcome=outcome(request, None, error), error__type=type(error).__name__)
                await self._write(self._entries(request, error=error))
                raise
            finally:
                request.stop()
            await self._write(self._entries(request, drawn=drawn))
            tell(saferedir__outcome="drawn", saferedir__redirected=sorted({name for own in drawn for name in own.redirected}))
        self._count(request, drawn)
        return drawn

    def _note(self, error: Exception) -> None:
        """Whatever is wrong with the safety stays known until a probe succeeds."""
        if isinstance(error, SafetyError | BackendError | AuditError):
            self.fault = error
            self.metrics.faults.labels(type(error).__name__).inc()
            log.error("fault: %s", error)

    def _count(self, request: UnderWay, drawn: Sequence[Drawn]) -> None:
        seen = [(name, "redirect") for own in drawn for name in own.redirected]
        seen += [(name, "observe") for own in drawn for name in own.observed]
        seen += [(name, "block") for name in request.blocked]
        for name, action in seen:
            self.metrics.concepts.labels(name, action).inc()
        for ticket in request.tickets if drawn or request.blocked else ():
            if ticket.job is not None and ticket.job.recorded:
                self.drift.seen(float(max(step["score"].max() for step in ticket.job.recorded)))

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
        self, request: UnderWay, gone: Gone | None, progress: OnProgress | None, preview: Preview | None, previews: int
    ) -> list[Drawn]:  # fmt: skip
        plan = request.plan
        self._watch(request, progress)
        for index, ticket in enumerate(request.tickets):
            if preview is not None:
                ticket.previewed, ticket.on_preview = _spread(request.steps, previews), partial(_shown, request, preview, index)
        drawings = await self._in_time(self.pipeline.drawings, plan, plan.requests)
        self.batcher.submit(request.tickets, drawings)
        drawn = await self._ended(request, gone)
        denoised = time.monotonic()
        made = await self._in_time(self.pipeline.finish, plan, drawn)
        self.metrics.decode_seconds.observe(time.monotonic() - denoised)
        return [
            Drawn(
                f"{request.id}_{index}", image, record,
                request.policy.fired(result.fired), request.policy.observed(result.score),
            )
            for index, (image, record, result) in enumerate(zip(made.images, made.records, drawn, strict=True))
        ]  # fmt: skip

    def _watch(self, request: UnderWay, progress: OnProgress | None) -> None:
        """Stop the request where its policy blocks a concept that fires, and tell of its steps."""
        policy, first = request.policy, [False]
        stops = np.array([policy.actions[name] == "block" for name in policy.engine.concepts])

        def after_step(index: int, done: int, total: int) -> None:
            if not first[0]:
                first[0] = True
                self.metrics.wait_seconds.observe(time.time() - request.began)
            job = request.tickets[index].job
            assert job is not None
            # Scores, not firings: the detector looks while it rests after a firing as well.
            seen = stops & (job.last["score"] >= policy.engine.threshold) if job.last else np.zeros_like(stops)
            if np.any(seen):
                request.blocked |= _named(policy.engine.concepts, seen)
                request.stop()
            if progress is not None:
                names, last = policy.engine.concepts, job.last
                scores = dict(zip(names, map(float, last["score"]), strict=True)) if last else {}
                fired = sorted(_named(names, last["fired"])) if last else []
                done_of_all = sum(own.done for own in request.tickets)
                progress(Progress(index, done, done_of_all, total * len(request.tickets), scores, fired))

        for index, ticket in enumerate(request.tickets):
            ticket.on_step = partial(after_step, index)

    async def _ended(self, request: UnderWay, gone: Gone | None) -> list[Denoised]:
        """What was drawn, unless the policy, the client or the deadline ended it."""
        futures = [asyncio.wrap_future(ticket.future) for ticket in request.tickets]
        for future in futures:
            future.add_done_callback(_retrieved)
        drawn = asyncio.ensure_future(asyncio.wait(futures, return_when=asyncio.FIRST_EXCEPTION))
        left = None if gone is None else asyncio.ensure_future(gone())
        watched: set[asyncio.Future[Any]] = {drawn} if left is None else {drawn, left}
        try:
            await asyncio.wait(watched, return_when=asyncio.FIRST_COMPLETED, timeout=request.deadline - time.monotonic())
            if left is not None and left.done():
                request.stop()
            await asyncio.wait({drawn}, timeout=self.grace(request.plan.engine))
            if not drawn.done():
                raise UnresponsiveError(f"no step has ended for {self.grace(request.plan.engine):.0f} s after the request did")
            if request.blocked:
                raise BlockedError(sorted(request.blocked), max(ticket.done for ticket in request.tickets))
            failed = [future for future in futures if future.done() and future.exception() is not None]
            return [future.result() for future in failed or futures]
        finally:
            drawn.cancel()
            if left is not None:
                left.cancel()

    def grace(self, engine: str = "step") -> float:
        """Seconds that the step under way may take when a request has ended."""
        return max(GRACE_SECONDS, GRACE_STEPS * self.batcher.times.of(engine, self.batcher.capacity))

    async def _in_time(self, work: Callable[..., T], *arguments: Any) -> T:
        """What `work` makes on a thread.

        Raises:
            UnresponsiveError: it takes longer than a request may.
        """
        made = asyncio.get_running_loop().run_in_executor(self._models, partial(work, *arguments))
        try:
            return await asyncio.wait_for(made, self.seconds)
        except TimeoutError:
            raise UnresponsiveError(f"an engine has not answered for {self.seconds:g} s") from None

    def _entries(self, request: UnderWay, *, drawn: Sequence[Drawn] = (), error: Exception | None = None) -> list[Entry]:
        own: Sequence[Drawn | None] = drawn or [None] * request.asked.pictures
        digest = self.pipeline.bundle.digest
        return [entry(request, index, digest, drawn=each, error=error) for index, each in enumerate(own)]

    async def _write(self, entries: Sequence[Entry]) -> None:
        """Into the audit, before any picture of theirs leaves.

        Raises:
            AuditError: it could not be written.
        """
        began = time.monotonic()
        writing = asyncio.get_running_loop().run_in_executor(self._writer, self.audit.append, entries)
        try:
            await asyncio.wait_for(writing, WRITE_SECONDS)
        except (AuditError, TimeoutError) as error:
            slow = AuditError(f"the audit has not answered for {WRITE_SECONDS:g} s")
            failed = error if isinstance(error, AuditError) else slow
            self._note(failed)
            raise failed from None
        self.metrics.audit_seconds.observe(time.monotonic() - began)
        for own in entries:
            self.metrics.pictures.labels(own.body["outcome"]).inc()


def _shown(request: UnderWay, preview: Preview, index: int, latent: Any) -> None:
    request.previews += 1
    preview(index, latent)


def _named(names: Sequence[str], chosen: np.ndarray[Any, Any]) -> set[str]:
    return {name for name, own in zip(names, chosen, strict=True) if own}


def _retrieved(future: asyncio.Future[Any]) -> None:
    """Whatever became of it is known to whoever asked."""
    if not future.cancelled():
        future.exception()


def _spread(steps: int, previews: int) -> frozenset[int]:
    """After which steps a picture is shown, spread evenly; never after the last, which ends it."""
    return frozenset(step for part in range(1, previews + 1) if 0 < (step := round(part * steps / (previews + 1))) < steps)
