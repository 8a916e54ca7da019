"""A picture of the audit, drawn again and compared with its record."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from saferedir.engines.errors import RequestError, VerificationError
from saferedir.engines.manifest import SafetyInfo
from saferedir.runtime.outputs import png_bytes
from saferedir.runtime.pipeline import Pipeline
from saferedir.runtime.policy import ResolvedPolicy, SafetyPolicy, resolve
from saferedir.runtime.serve.audit import Audit


def replay(audit: Audit, id: str, *, prompt: str | None, bundle: str, out: Path | None) -> str:
    """Draw the picture `id` again; says that it equals what left.

    Raises:
        RequestError: its prompt is not known, or it never left. VerificationError: what is drawn is another picture.
    """
    body, kept = audit.find(id)
    text = prompt if prompt is not None else kept
    if text is None:
        raise RequestError(f"the audit has kept no text of {id!r}; give it by --prompt")
    if body["outcome"] not in ("drawn", "redirected"):
        raise RequestError(f"{id!r} never left: {body['outcome']}")
    pipeline = Pipeline.from_bundle(bundle)
    if body["bundle"] != pipeline.bundle.digest:
        raise RequestError(f"{id!r} was drawn with bundle {body['bundle']}; this is {pipeline.bundle.digest}")
    height, width = (side * pipeline.model.vae_scale_factor for side in body["size"])
    plan = pipeline.plan(
        text, negative_prompt=body["negative_prompt"], seed=body["seed"], num_inference_steps=body["steps"], height=height,
        width=width, guidance_scale=body["guidance_scale"], guidance_rescale=body["guidance_rescale"],
        scheduler=body["scheduler"], policy=_policy(body, pipeline.manifest.safety),
    )  # fmt: skip
    (image,) = pipeline.finish(plan, pipeline.draw(plan)).images
    if out is not None:
        out.write_bytes(png_bytes(image))
    found = hashlib.sha256(image.tobytes()).hexdigest()
    if found != body["pixels"]:
        raise VerificationError(f"{id!r} is drawn as another picture now: pixels {found[:12]}, recorded {body['pixels'][:12]}")
    return f"{id} is drawn again, to the byte"


def _policy(body: dict[str, Any], safety: SafetyInfo) -> ResolvedPolicy:
    """The policy that the picture was drawn under."""
    own = resolve(SafetyPolicy(beyond_promise=True), safety)
    looked_for = np.array([body["actions"][name] != "observe" for name in own.concepts])
    return replace(own, enabled=looked_for, threshold=np.array([body["thresholds"][name] for name in own.concepts], np.float32))
