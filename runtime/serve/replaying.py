"""A picture of the audit, drawn again and compared with its record."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any

import numpy as np
from PIL import Image

from saferedir.engines.errors import RequestError, VerificationError
from saferedir.engines.manifest import SafetyInfo
from saferedir.runtime.pipeline import Pipeline
from saferedir.runtime.policy import ResolvedPolicy, SafetyPolicy, resolve
from saferedir.runtime.serve.audit import Audit


def replay(
    audit: Audit, id: str, pipeline: Pipeline, *, prompt: str | None = None, negative_prompt: str | None = None
) -> Image.Image:
    """The picture `id`, drawn again by a pipeline of the same bundle, and equal to what left to the byte.

    Raises:
        RequestError: its prompts are not known, or others, or it never left.
        VerificationError: what is drawn is another picture.
    """
    body, kept = audit.find(id)
    texts = {"prompt": prompt, "negative_prompt": negative_prompt} if prompt is not None else kept
    if texts is None:
        raise RequestError(f"the audit has kept no text of {id!r}; give it by --prompt, and --negative if there was one")
    if audit.are_of(id, texts) is False:
        raise RequestError(f"these are not the prompts of {id!r}")
    if body["outcome"] not in ("drawn", "redirected"):
        raise RequestError(f"{id!r} never left: {body['outcome']}")
    if body["bundle"] != pipeline.bundle.digest:
        raise RequestError(f"{id!r} was drawn with bundle {body['bundle']}; this is {pipeline.bundle.digest}")
    height, width = (side * pipeline.model.vae_scale_factor for side in body["size"])
    plan = pipeline.plan(
        texts["prompt"], negative_prompt=texts["negative_prompt"], seed=body["seed"], num_inference_steps=body["steps"],
        height=height, width=width, guidance_scale=body["guidance_scale"], guidance_rescale=body["guidance_rescale"],
        scheduler=body["scheduler"], policy=_policy(body, pipeline.manifest.safety),
    )  # fmt: skip
    (image,) = pipeline.finish(plan, pipeline.draw(plan)).images
    found = hashlib.sha256(image.tobytes()).hexdigest()
    if found != body["pixels"]:
        raise VerificationError(f"{id!r} is drawn as another picture now: pixels {found[:12]}, recorded {body['pixels'][:12]}")
    return image


def _policy(body: dict[str, Any], safety: SafetyInfo) -> ResolvedPolicy:
    """The policy that the picture was drawn under."""
    own = resolve(SafetyPolicy(beyond_promise=True), safety)
    looked_for = np.array([body["actions"][name] != "observe" for name in own.concepts])
    thresholds = np.array([body["thresholds"][name] for name in own.concepts], np.float32)
    return replace(own, enabled=looked_for, threshold=thresholds, cooldown=body["cooldown"])
