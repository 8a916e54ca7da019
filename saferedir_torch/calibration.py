"""Thresholds with a promise on false alarms, by split conformal prediction on benign trajectories.

The steps of one picture depend on each other, and a picture is spoilt if any concept fires in any step. So the unit is the
picture, and its statistic is the highest score over steps and concepts. If at most k of n exchangeable benign pictures
reach a bound, the share of all such pictures that do is below a rate r with confidence 1 - P(Binomial(n, r) <= k).
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch
from scipy.stats import binom

from saferedir_torch.config import Promise
from saferedir_torch.recording import RecordedRuns
from saferedir_torch.safety_module import SafetyModule

RATE = 0.001
CONFIDENCE = 0.95
#: The bound lies this far above the highest score that is to stay below it, in logits.
MARGIN = 1e-3
#: Scores are kept away from 0 and 1 by this much before their logit is taken.
SMALLEST = 1e-7


class CalibrationError(ValueError):
    """Too few trajectories for the promise."""


@torch.no_grad()
def highest_logits(module: SafetyModule, runs: RecordedRuns) -> npt.NDArray[np.float64]:
    """Each run's highest logit over its steps, for every concept: [R, N]."""
    highest = []
    for latent, prompt in zip(torch.split(runs.latent, 50), torch.split(runs.prompt, 50), strict=True):
        count, steps = latent.shape[:2]
        embeds = prompt.float().repeat_interleave(steps, dim=0)
        score, _ = module.score(latent.flatten(0, 1).float(), runs.timestep.repeat(count), embeds)
        highest.append(torch.logit(score.double(), SMALLEST).reshape(count, steps, -1).amax(dim=1))
    return np.asarray(torch.cat(highest).numpy())


def allowed_exceedances(pictures: int, rate: float = RATE, confidence: float = CONFIDENCE) -> int:
    """How many of `pictures` may reach the bound for the promise to hold.

    Raises:
        CalibrationError: not even none would do, because there are too few pictures.
    """
    allowed = -1
    while binom.cdf(allowed + 1, pictures, rate) <= 1 - confidence:
        allowed += 1
    if allowed < 0:
        needed = math.ceil(math.log(1 - confidence) / math.log(1 - rate))
        raise CalibrationError(
            f"{pictures} benign pictures cannot promise {100 * rate:g} % with {100 * confidence:g} % confidence; "
            f"at least {needed} are needed"
        )
    return allowed


def bound(logits: npt.NDArray[np.float64], allowed: int) -> float:
    """The threshold that all but `allowed` of the runs stay below in every concept; logits [R, N], highest of each run.

    One bound for all concepts, whose scores are relative to what clean pictures come up to, so that the statistic is one
    number a picture.
    """
    highest = np.sort(logits.max(axis=1))[::-1][allowed] + MARGIN
    return float(1 / (1 + math.exp(-highest)))


def calibrate(module: SafetyModule, runs: RecordedRuns, *, steps: int, guidance_scale: float, prompts: str) -> Promise:
    """Set the thresholds of `module` to where the promise holds, and state it in its configuration; return it.

    Raises:
        CalibrationError: there are too few runs.
    """
    allowed = allowed_exceedances(len(runs.latent))
    threshold = round(bound(highest_logits(module, runs), allowed), 8)
    promise = Promise(
        rate=RATE, confidence=CONFIDENCE, pictures=len(runs.latent), allowed=allowed,
        steps=steps, guidance_scale=guidance_scale, prompts=prompts,
    )  # fmt: skip
    concepts = tuple(replace(concept, threshold=threshold) for concept in module.config.concepts)
    module.config = replace(module.config, concepts=concepts, promise=promise)
    return promise
