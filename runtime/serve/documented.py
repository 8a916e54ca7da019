"""The shapes of answers, for the interface's own description (`/openapi.json`)."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel


class Image(BaseModel):
    """One picture."""

    b64_json: str


class Usage(BaseModel):
    """Tokens of the prompt that were read, and denoising steps."""

    input_tokens: int
    input_tokens_details: dict[str, int]
    output_tokens: int
    total_tokens: int


class Images(BaseModel):
    """Pictures, as the OpenAI interface has them."""

    created: int
    data: list[Image]
    background: str
    output_format: str
    quality: str
    size: str
    usage: Usage


class Picture(BaseModel):
    """One picture, with its safety record."""

    id: str
    b64_json: str
    redirected: list[str]
    observed: list[str]
    record: dict[str, Any]


class Pictures(BaseModel):
    """Pictures with their safety records."""

    created: int
    pictures: list[Picture]


class Model(BaseModel):
    """A model that is served."""

    id: str
    object: str
    created: int
    owned_by: str


class Models(BaseModel):
    """The models that are served."""

    object: str
    data: list[Model]


class Status(BaseModel):
    """Whether requests should be sent here, and why not."""

    status: str


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str


class Error(BaseModel):
    """Every answer that is none."""

    error: ErrorDetail


_REASONS = {
    400: "The request cannot be used, or the policy refuses it (`moderation_blocked`).",
    401: "The key is missing or not known.",
    404: "There is no such thing.",
    405: "Not that method.",
    408: "The body was slow.",
    409: "The Idempotency-Key was of another request.",
    413: "The body is too large.",
    429: "Too much is asked for; Retry-After says when to come again.",
    500: "The safety failed, and no picture leaves.",
    503: "Starting, draining, or the audit cannot be written.",
    504: "The deadline passed.",
}
#: What any endpoint may answer.
ANSWERS: dict[int | str, dict[str, Any]] = {status: {"model": Error, "description": why} for status, why in _REASONS.items()}
#: Of those that stream where they are asked to.
STREAMS: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}}}
