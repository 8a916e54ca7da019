"""The page of a service: a prompt drawn before one's eyes, and a reviewer's look at the audit."""

from __future__ import annotations

import asyncio
import base64
import hmac
from dataclasses import replace
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import HTMLResponse

from saferedir.runtime.outputs import png_bytes
from saferedir.runtime.page import asset
from saferedir.runtime.schedulers import SCHEDULERS
from saferedir.runtime.serve.bodies import PicturesBody
from saferedir.runtime.serve.errors import NO_RETRY, ServiceError
from saferedir.runtime.serve.pictures import stream
from saferedir.runtime.serve.policies import ANYONE
from saferedir.runtime.serve.replaying import replay
from saferedir.runtime.serve.state import State, caller, state_of
from saferedir.runtime.serve.streams import streamed

router = APIRouter(include_in_schema=False)
Answer = dict[str, Any]


@router.get("/", response_class=HTMLResponse)
async def page() -> str:
    """The page, with all that it needs in it."""
    script = asset("page.js") + asset("served.js")
    return asset("served.html").replace("/*CSS*/", asset("page.css")).replace("/*JS*/", script)


@router.get("/page/setup")
async def setup(request: Request) -> Answer:
    """What the page offers."""
    state = state_of(request, draining=True)
    manifest, policy = state.service.pipeline.manifest, state.service.policies.of(ANYONE)
    envelope = None if manifest.safety.promise is None else manifest.safety.promise.envelope
    assert manifest.scheduler is not None
    return {
        "model": manifest.name,
        "concepts": [
            {"name": name, "action": policy.actions[name], "threshold": float(policy.engine.threshold[index])}
            for index, name in enumerate(policy.engine.concepts)
        ],
        "replacements": {concept.name: concept.replacement for concept in manifest.safety.concepts},
        "samplers": list(SCHEDULERS if envelope is None else envelope.samplers),
        "sampler": manifest.scheduler.kind,
        "steps": None if envelope is None else list(envelope.steps),
        "most_steps": state.settings.most_steps,
        "needs_key": state.keys.required,
        "unprotected": state.settings.page_unprotected,
        "review": bool(state.settings.review_key.get_secret_value()),
    }


@router.post("/page/unprotected")
async def unprotected(body: PicturesBody, request: Request) -> Response:
    """The same without the safety, where the operator allows it: logged, and recorded as such."""
    state, tenant = await caller(request)
    if not state.settings.page_unprotected:
        raise ServiceError(403, "invalid_request_error", "not_allowed", "The operator does not allow it.", None, NO_RETRY)
    asked = replace(state.limited(body.asked()), tighten=None)
    return streamed(partial(stream, state, body, state.admit(request, asked, tenant, unprotected=True)))


@router.get("/page/audit")
async def records(
    request: Request,
    outcome: str | None = None,
    concept: str | None = None,
    tenant: str | None = None,
    before: Annotated[int | None, Query(ge=1)] = None,
    limit: Annotated[int, Query(ge=1, le=500)] = 50,
) -> Answer:
    """The latest records before a number, of an outcome, a concept that fired, a tenant."""
    state = _reviewed(request)

    def wanted(record: dict[str, Any]) -> bool:
        fired = {name for step in record["fired"] for name in step} | set(record["blocked"])
        return (
            outcome in (None, record["outcome"])
            and tenant in (None, record["tenant"])
            and (concept is None or concept in fired)
        )

    found = await asyncio.to_thread(state.service.audit.latest, wanted, before=before, limit=limit)
    return {"records": found}


@router.post("/page/audit/{id}/replay")
async def again(id: str, request: Request) -> Answer:
    """The picture of a record, drawn again and equal to the byte."""
    state = _reviewed(request)
    image = await asyncio.to_thread(replay, state.service.audit, id, state.service.pipeline)
    return {"b64_json": base64.b64encode(png_bytes(image)).decode()}


def _reviewed(request: Request) -> State:
    """
    Raises:
        ServiceError: there is no reviewer here, or this is not one.
    """
    state: State | None = request.app.state.own
    key = "" if state is None else state.settings.review_key.get_secret_value()
    given = request.headers.get("authorization", "").removeprefix("Bearer ")
    if state is None or not key or not hmac.compare_digest(key.encode(), given.encode()):
        raise ServiceError(401, "invalid_request_error", "invalid_api_key", "The reviewer's key is not right.", None, NO_RETRY)
    return state
