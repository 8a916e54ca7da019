"""The settings that a safety module is made for: numbers of steps, samplers, guidance scales. Training and calibration draw
their pictures across them, and the promise names them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from saferedir.engines.manifest import Envelope

#: Of a model that is no consistency model.
ENVELOPE = Envelope(
    steps=(4, 50),
    samplers=(
        "ddim",
        "euler",
        "euler-ancestral",
        "dpm++-2m",
        "dpm++-2m-karras",
        "euler-karras",
        "dpm++-2m-exponential",
        "euler-exponential",
    ),
    guidance_scale=(1.0, 12.0),
)
#: Numbers of steps that pictures are drawn with, and how often. A promise is for all of them; what learns to see a picture
#: before it is there needs many pictures rather than many steps of each, so that training has more of few steps.
STEPS = (4, 5, 6, 8, 10, 12, 15, 20, 25, 30, 40, 50)
PROMISED = (4, 4, 4, 4, 4, 4, 3, 3, 3, 1, 1, 1)
TAUGHT = (20, 20, 20, 20, 16, 14, 10, 8, 6, 3, 2, 2)
GUIDANCE_SCALES = (1.0, 2.0, 3.0, 5.0, 5.0, 7.5, 7.5, 10.0, 12.0)


class Sampling(NamedTuple):
    """How pictures are drawn."""

    sampler: str
    steps: int
    guidance_scale: float


def samplings(count: int, envelope: Envelope, rng: np.random.Generator, often: Sequence[int] = PROMISED) -> list[Sampling]:
    """`count` of them within `envelope`: every sampler in turn, the rest by chance; `often` says how often each of `STEPS`."""
    low, high = envelope.steps
    within = [(steps, weight) for steps, weight in zip(STEPS, often, strict=True) if low <= steps <= high]
    steps, weights = zip(*(within or [(low, 1)]), strict=True)
    scales = _between(GUIDANCE_SCALES, *envelope.guidance_scale)
    shares = np.array(weights) / sum(weights)
    found = []
    for index in range(count):  # one after another, so that the first ones are the same however many there are
        chosen, scale = rng.choice(steps, p=shares), scales[int(rng.integers(len(scales)))]
        found.append(Sampling(envelope.samplers[index % len(envelope.samplers)], int(chosen), scale))
    return found


def _between(values: Sequence[float], low: float, high: float) -> list[float]:
    return [value for value in values if low <= value <= high] or [low]
