"""How errors are told: in the form of the OpenAI interface, and whether it is worth trying again."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from saferedir.engines.errors import (
    AuditError,
    BlockedError,
    CancelledError,
    DeadlineError,
    QueueFullError,
    RequestError,
    SafeRedirError,
    SafetyError,
    VerificationError,
)

#: Of what cannot be mended by trying again: clients obey it, whatever the status.
NO_RETRY = {"x-should-retry": "false"}


@dataclass
class ServiceError(Exception):
    """What a client is told."""

    status: int
    type: str
    code: str
    message: str
    #: The field that is wrong.
    param: str | None = None
    headers: dict[str, str] | None = None
    #: Further fields.
    more: dict[str, Any] | None = None

    @property
    def body(self) -> dict[str, Any]:
        """As JSON."""
        told = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return {"error": told | (self.more or {})}


def invalid(message: str, param: str | None = None, code: str = "invalid_value") -> ServiceError:
    """A request that cannot be used."""
    return ServiceError(400, "invalid_request_error", code, message, param, NO_RETRY)


def too_large(most: int) -> ServiceError:
    """A body of more bytes than are taken."""
    message = f"The body is larger than {most} bytes."
    return ServiceError(413, "invalid_request_error", "body_too_large", message, None, NO_RETRY)


def told(error: SafeRedirError) -> ServiceError:
    """What a client is told of an error of the product."""
    match error:
        case RequestError():
            return invalid(str(error))
        case BlockedError():
            refused = {"moderation": {"stage": "generation", "categories": list(error.concepts)}}
            message = "The request was refused by the safety policy of this service."
            return ServiceError(400, "image_generation_user_error", "moderation_blocked", message, None, NO_RETRY, refused)
        case QueueFullError():
            wait = {"retry-after": str(max(1, math.ceil(error.retry_after)))}
            return ServiceError(429, "rate_limit_error", "queue_full", str(error), None, wait)
        case DeadlineError():
            return ServiceError(504, "timeout_error", "deadline_exceeded", str(error), None, NO_RETRY)
        case CancelledError():
            return ServiceError(499, "invalid_request_error", "cancelled", str(error), None, NO_RETRY)
        case AuditError():
            message = "The record of the picture could not be written; no picture leaves without one."
            return ServiceError(503, "server_error", "audit_unavailable", message, None, {"retry-after": "2"})
        case VerificationError():
            return ServiceError(409, "server_error", "not_equal", str(error), None, NO_RETRY)
        case SafetyError():
            message = "The safety failed, and no picture leaves without it."
            return ServiceError(500, "server_error", "safety_failed", message, None, NO_RETRY)
    return ServiceError(500, "server_error", "internal_error", "The picture could not be drawn.", None, NO_RETRY)
