"""What requests hold: the OpenAI images interface, and this service's own. Every field is used or refused."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from saferedir.runtime.policy import Tightening
from saferedir.runtime.serve.asked import Asked

#: Denoising steps of a quality.
QUALITY = {"low": 12, "medium": 25, "high": 50, "auto": 25, "standard": 25, "hd": 50}
Kind = Literal["png", "jpeg", "webp"]
Prompt = Annotated[str, Field(min_length=1)]
Seed = Annotated[int, Field(ge=-(2**63), le=2**64 - 1)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class ImagesBody(_Body):
    """`POST /v1/images/generations`, as the OpenAI interface has it, with `seed` besides."""

    prompt: Prompt
    #: The name of the bundle that is served; it may be left out.
    model: str | None = None
    n: Annotated[int, Field(ge=1, le=10)] = 1
    #: WIDTHxHEIGHT, or auto.
    size: Annotated[str, Field(pattern=r"^(auto|[1-9][0-9]{0,4}x[1-9][0-9]{0,4})$")] = "auto"
    #: How many denoising steps: low 12, medium 25, high 50.
    quality: Literal["auto", "low", "medium", "high", "standard", "hd"] = "auto"
    output_format: Kind = "png"
    #: Quality of jpeg and webp.
    output_compression: Annotated[int, Field(ge=0, le=100)] | None = None
    background: Literal["auto", "opaque"] = "auto"
    #: Accepted, as clients send it; it never loosens anything.
    moderation: Literal["auto", "low"] = "auto"
    response_format: Literal["b64_json"] = "b64_json"
    stream: bool = False
    partial_images: Annotated[int, Field(ge=0, le=3)] = 0
    #: Who asks, for the audit.
    safety_identifier: Annotated[str, Field(max_length=64)] | None = None
    user: Annotated[str, Field(max_length=64)] | None = None
    seed: Seed | None = None

    def asked(self) -> Asked:
        """What it asks for."""
        width, height = (None, None) if self.size == "auto" else map(int, self.size.split("x"))
        return Asked(
            prompt=self.prompt, pictures=self.n, height=height, width=width, seed=self.seed, steps=QUALITY[self.quality],
            user=self.safety_identifier or self.user,
        )  # fmt: skip


class TightenBody(_Body):
    """What a request may ask for: more concepts, lower thresholds."""

    enabled: Annotated[list[str], Field(max_length=1000)] = []
    thresholds: dict[str, Annotated[float, Field(ge=0, le=1)]] = {}


class PicturesBody(_Body):
    """`POST /v1/pictures`: all that the runtime draws by, with the safety record in the answer."""

    prompt: Prompt
    negative_prompt: str | None = None
    pictures: Annotated[int, Field(ge=1, le=10)] = 1
    height: Annotated[int, Field(ge=1, le=100_000)] | None = None
    width: Annotated[int, Field(ge=1, le=100_000)] | None = None
    seed: Seed | None = None
    steps: Annotated[int, Field(ge=1, le=999)] = 25
    guidance_scale: Annotated[float, Field(ge=0, le=100)] = 5.0
    guidance_rescale: Annotated[float, Field(ge=0, le=1)] = 0.0
    sampler: str | None = None
    tighten: TightenBody | None = None
    output_format: Kind = "png"
    output_compression: Annotated[int, Field(ge=0, le=100)] | None = None
    #: Whether the answer is a stream of events: scores after every step, pictures in progress, then the pictures.
    stream: bool = False
    #: Of a stream: how many pictures in progress are shown, each after the decision that saw it.
    previews: Annotated[int, Field(ge=0, le=999)] = 0
    #: Seconds from now by which it is worth having.
    within: Annotated[float, Field(gt=0, le=86_400)] | None = None
    #: Higher is served first.
    priority: Annotated[int, Field(ge=-10, le=10)] = 0
    user: Annotated[str, Field(max_length=64)] | None = None

    def asked(self) -> Asked:
        """What it asks for."""
        own = self.tighten
        tighten = None if own is None else Tightening(enabled=own.enabled, thresholds=own.thresholds)
        return Asked(
            prompt=self.prompt, negative_prompt=self.negative_prompt, pictures=self.pictures, height=self.height,
            width=self.width, seed=self.seed, steps=self.steps, guidance_scale=self.guidance_scale,
            guidance_rescale=self.guidance_rescale, scheduler=self.sampler, tighten=tighten, within=self.within,
            priority=self.priority, user=self.user,
        )  # fmt: skip
