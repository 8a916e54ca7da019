"""What a client asks for, what it gets, and a request on its way from the one to the other."""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from saferedir.runtime.pipeline import Plan
from saferedir.runtime.policy import Tightening
from saferedir.runtime.record import SafetyRecord
from saferedir.runtime.serve.policies import TenantPolicy
from saferedir.runtime.ticket import Ticket


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
class Progress:
    """A step that was just done."""

    #: Which of the request's pictures, from 0, and which of its steps, from 1.
    picture: int
    step: int
    #: Steps done and steps in all, over all pictures of the request.
    done: int
    total: int
    #: Concept -> score of this step.
    scores: dict[str, float]
    #: Concepts that fired in it.
    fired: list[str]


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
class UnderWay:
    """One request: its tickets, and why they were stopped."""

    id: str
    #: As `x-request-id` names it.
    request_id: str
    tenant: str
    asked: Asked
    policy: TenantPolicy
    plan: Plan
    #: As the clock on the wall has it, and by when it is to be drawn, as `time.monotonic` counts.
    began: float
    deadline: float
    #: Whether its record may be there already.
    again: bool = False
    tickets: list[Ticket] = field(default_factory=list)
    #: How many pictures in progress have left.
    previews: int = 0
    #: Concepts that stopped it.
    blocked: set[str] = field(default_factory=set)

    @property
    def steps(self) -> int:
        """Of each picture."""
        return len(self.plan.schedule.timesteps)

    def stop(self) -> None:
        for ticket in self.tickets:
            ticket.cancel()


def picture_bytes(image: Image.Image, kind: str, compression: int | None = None) -> bytes:
    """The picture as png, jpeg or webp; `compression` is the quality of the latter two, 0 to 100."""
    buffer = io.BytesIO()
    options: dict[str, Any] = {} if kind == "png" or compression is None else {"quality": compression}
    image.save(buffer, kind.upper(), **options)
    return buffer.getvalue()
