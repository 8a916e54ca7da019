"""What the audit is told of a picture."""

from __future__ import annotations

import hashlib
import time
from datetime import UTC, datetime
from typing import Any, Literal

from saferedir.engines.errors import CancelledError, DeadlineError
from saferedir.runtime.serve.asked import Drawn, UnderWay
from saferedir.runtime.serve.audit import Entry

Outcome = Literal["drawn", "redirected", "blocked", "cancelled", "late", "failed", "unprotected"]


def outcome(request: UnderWay, drawn: Drawn | None, error: Exception | None) -> Outcome:
    """What became of a picture, in a word."""
    if drawn is not None and not drawn.record.protected and request.plan.policy.unprotected:
        return "unprotected"
    if drawn is not None:
        return "redirected" if drawn.redirected else "drawn"
    if request.blocked:
        return "blocked"
    if isinstance(error, DeadlineError):
        return "late"
    return "cancelled" if isinstance(error, CancelledError) else "failed"


def entry(request: UnderWay, index: int, bundle: str, *, drawn: Drawn | None = None, error: Exception | None = None) -> Entry:
    """Of picture `index` of a request: what was asked for, under which policy, what every step saw, and how it ended.

    `bundle` is the digest of the bundle that drew it.
    """
    asked, plan, job, names = request.asked, request.plan, request.tickets[index].job, request.plan.policy.concepts
    steps = [] if job is None else job.recorded
    body: dict[str, Any] = {
        "request": request.request_id,
        "at": datetime.fromtimestamp(request.began, UTC).isoformat(),
        "seconds": round(time.time() - request.began, 3),
        "tenant": request.tenant,
        "user": asked.user,
        "policy": {"version": request.policy.version, "digest": request.policy.digest},
        "bundle": bundle,
        "seed": plan.requests[index].seed,
        "scheduler": plan.scheduler,
        "steps": asked.steps,
        "guidance_scale": plan.guidance_scale,
        "guidance_rescale": plan.guidance_rescale,
        "size": list(plan.size),
        "actions": dict(request.policy.actions),
        "thresholds": dict(zip(plan.policy.concepts, plan.policy.threshold.tolist(), strict=True)),
        "unprotected": plan.policy.unprotected,
        "cooldown": plan.policy.cooldown,
        "outcome": outcome(request, drawn, error),
        "steps_done": request.tickets[index].done,
        "previews": request.previews,
        "scores": [step["score"].tolist() for step in steps],
        "fired": [[name for name, fired in zip(names, step["fired"], strict=True) if fired] for step in steps],
        "observed": [] if drawn is None else drawn.observed,
        "blocked": sorted(request.blocked),
        "pixels": None if drawn is None else hashlib.sha256(drawn.image.tobytes()).hexdigest(),
        "error": None if error is None else type(error).__name__,
    }
    texts = {"prompt": asked.prompt, "negative_prompt": asked.negative_prompt}
    return Entry(f"{request.id}_{index}", body, texts, request.again)
