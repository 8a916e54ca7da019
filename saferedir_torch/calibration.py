"""Thresholds with a promise on false alarms, by split conformal prediction on benign trajectories.

Some pictures first say how high clean logits come at each timestep; scores are relative to that from then on. Others, which
had no part in it, set the bound.

The steps of one picture depend on each other, and a picture is spoilt if any concept fires in any step. So the unit is the
picture, and its statistic is the highest score over steps and concepts. If at most k of n exchangeable benign pictures
reach a bound, the share of all such pictures that do is below a rate r with confidence 1 - P(Binomial(n, r) <= k).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from msgspec.structs import replace
from scipy.stats import beta, binom
from torch import Tensor

from saferedir.engines.errors import RequestError
from saferedir.engines.manifest import Promise
from saferedir_torch.estimate import shown_estimate
from saferedir_torch.recording import RecordedRuns
from saferedir_torch.safety_module import HIGHEST, KNOTS, NOISE_FROM, TIMESTEPS, SafetyModule, near_knots
from saferedir_torch.training_data import PICTURE_SHOWS

log = logging.getLogger("saferedir")

RATE = 0.001
CONFIDENCE = 0.95
#: No larger rate is promised for added concepts and those before them.
WORST_RATE = 0.01
#: Share of benign pictures whose logits are taken for the tail, and how rarely one is to come up to its level.
TAIL, RARE = 0.02, 2e-4
#: The bound lies this far above the highest score that is to stay below it, in logits.
MARGIN = 1e-3
#: The same of what two sources say together, whose level is rounded to half precision.
AGREED_MARGIN = 0.02
#: Scores are kept away from 0 and 1 by this much before their logit is taken.
SMALLEST = 1e-7


def highest_logits(module: SafetyModule, runs: RecordedRuns) -> npt.NDArray[np.float64]:
    """Each run's highest logit over its steps, relative to the levels, for every concept: [R, N]."""
    return np.asarray(_logits(module, runs).amax(dim=1).numpy())


def set_levels(module: SafetyModule, runs: RecordedRuns) -> None:
    """Set the levels of the branch trained last to what a benign picture comes up to around each knot once in 5,000.

    That is read off the tail of the benign `runs`, so that it is about as rare for every concept and time, however far their
    tails reach: one bound for all then costs each the same. From where a latent shows the picture on, there is one level for
    all knots: what one benign latent in thousands comes up to there cannot be told knot by knot from as many pictures.
    Latents without the prompt are the same task at every knot, and have a level at each.

    At last all levels of a concept are moved alike, so that it comes up above them in 0.1 % of the pictures: where its tail is
    heavier than an exponential one, the bound for all would otherwise be its own.
    """
    branch, own = module.last_branch, len(module.last_branch.gains)
    branch.prompt_levels.fill_(HIGHEST)
    look = branch.alone
    if look is not None:
        branch.agreed_levels.fill_(HIGHEST)

    def raw(latent: Tensor, timestep: Tensor, prompt: Tensor, expected: Tensor | None) -> Tensor:
        features = module.features(latent, timestep, expected)
        together = branch.logits(features.joint, prompt)
        return together if look is None or features.shown is None else torch.cat([together, features.shown], dim=1)

    logits = _of_every_step(module, runs, raw)
    together, alone = logits[:, :, :own], logits[:, :, own:]
    spacing = TIMESTEPS / (KNOTS - 1)
    near = (runs.timestep[:, None] - torch.arange(KNOTS) * spacing).abs() <= spacing  # [S, KNOTS]
    at_every_knot = near.clone()
    shows = torch.arange(KNOTS) * spacing < PICTURE_SHOWS
    near[:, shows] = near[:, shows].any(dim=1, keepdim=True)
    # Rounded as they will be on disk, so that the bound is for what is stored.
    branch.levels.copy_(tail_level(_reached(together, near)).half())
    highest = _above(together, runs.timestep, branch.levels, branch.gains)
    if look is not None:
        branch.alone_levels.copy_(tail_level(_reached(alone, at_every_knot)).half())
        highest = torch.maximum(highest, _above(alone, runs.timestep, branch.alone_levels, branch.alone_gains))
    above = torch.quantile(highest.double(), 1 - RATE, dim=0).float().to(branch.gains)
    branch.levels.add_((above / branch.gains)[:, None]).copy_(branch.levels.half())
    if look is not None:
        branch.alone_levels.add_((above / branch.alone_gains)[:, None]).copy_(branch.alone_levels.half())


def set_agreed_levels(module: SafetyModule, runs: RecordedRuns) -> int:
    """Set the levels of what all inputs and the step alone say together, once thresholds are set: for none of the benign `runs`
    is it to fire that does not fire as it is. Returns how many do.

    One level is for all timesteps, since both are relative to levels of their own already.
    """
    branch = module.last_branch
    assert branch.alone is not None
    branch.agreed_levels.fill_(HIGHEST)
    thresholds = torch.tensor([logit_of(concept.threshold) for concept in module.config.concepts]).double()
    fires = (torch.from_numpy(highest_logits(module, runs)) >= thresholds).any(dim=1)

    def added_up(latent: Tensor, timestep: Tensor, prompt: Tensor, expected: Tensor | None) -> Tensor:
        features = module.features(latent, timestep, expected)
        assert features.shown is not None
        of_all = branch.comparable(branch.logits(features.joint, prompt), timestep)
        both = of_all + branch.comparable_alone(features.shown, timestep)
        return torch.where((timestep >= NOISE_FROM)[:, None], torch.full_like(both, -HIGHEST), both)

    highest = _of_every_step(module, runs, added_up).amax(dim=1)[~fires].amax(dim=0)
    own = thresholds[-len(highest) :]
    branch.agreed_levels.copy_(highest - own + AGREED_MARGIN).copy_(branch.agreed_levels.half())
    return int(fires.sum())


def _above(logits: Tensor, timestep: Tensor, levels: Tensor, gains: Tensor) -> Tensor:
    """The most by which each run's logits [R, S, N] pass their levels [N, KNOTS], stretched by the gains: [R, N]."""
    return ((logits - near_knots(timestep) @ levels.T.cpu()) * gains.cpu()).amax(dim=1)


def _reached(logits: Tensor, near: Tensor) -> Tensor:
    """The highest of each run's logits [R, S, N] among the steps near each knot [S, KNOTS], or the lowest of all where there
    is no such step: [R, N, KNOTS]."""
    return torch.stack([logits[:, steps].amax(dim=1) if steps.any() else logits.amin(dim=1) for steps in near.T], dim=2)


def tail_level(reached: Tensor) -> Tensor:
    """What is reached once in `1 / RARE` cases, from R of them along the first dimension, by an exponential tail.

    Of the highest share `TAIL` the mean excess over its beginning is the tail's scale.
    """
    begins = torch.quantile(reached, 1 - TAIL, dim=0)
    excess = torch.relu(reached - begins)
    scale = excess.sum(dim=0) / (excess > 0).sum(dim=0).clamp(min=1)
    return begins + scale * math.log(TAIL / RARE)


def _logits(module: SafetyModule, runs: RecordedRuns) -> Tensor:
    """Logits of every step, relative to the levels: [R, S, N], on the CPU wherever `module` is."""
    score = _of_every_step(module, runs, lambda *seen: module.score(*seen).score)
    return torch.logit(score.double(), SMALLEST)


@torch.no_grad()
def _of_every_step(
    module: SafetyModule, runs: RecordedRuns, of_steps: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
) -> Tensor:
    """What `of_steps` makes of latents, timesteps, prompts and expected pictures, for every step of every run: [R, S, N], on
    the CPU."""
    parts = []
    device = next(module.parameters()).device
    for latent, estimate, prompt in zip(
        *(torch.split(part, 50) for part in (runs.latent, runs.denoised, runs.prompt)), strict=True
    ):
        count, steps = latent.shape[:2]
        embeds = prompt.float().repeat_interleave(steps, dim=0).to(device)
        ahead = shown_estimate(estimate.flatten(0, 1)).to(device)
        found = of_steps(latent.flatten(0, 1).float().to(device), runs.timestep.repeat(count).to(device), embeds, ahead)
        parts.append(found.cpu().reshape(count, steps, -1))
    return torch.cat(parts)


def allowed_exceedances(pictures: int, rate: float = RATE, confidence: float = CONFIDENCE) -> int:
    """How many of `pictures` may reach the bound for the promise to hold.

    Raises:
        RequestError: not even none would do, because there are too few pictures.
    """
    allowed = -1
    while binom.cdf(allowed + 1, pictures, rate) <= 1 - confidence:
        allowed += 1
    if allowed < 0:
        needed = math.ceil(math.log(1 - confidence) / math.log(1 - rate))
        raise RequestError(
            f"{pictures} benign pictures cannot promise {100 * rate:g} % with {100 * confidence:g} % confidence; "
            f"at least {needed} are needed"
        )
    return allowed


def joint_rate(spoilt: int, pictures: int, confidence: float = CONFIDENCE) -> float:
    """The rate that holds where concepts with given thresholds fire on `spoilt` of `pictures`, and those added to them on no
    other.

    Each half of what may go wrong is spent on one of the two: on the rate of the former (Clopper and Pearson's upper limit),
    and on that at which the latter exceed the highest score they had on the same pictures.
    """
    if spoilt == pictures:
        return 1.0
    each = 1 - (1 - confidence) / 2
    return float(beta.ppf(each, spoilt + 1, pictures - spoilt) + beta.ppf(each, 1, pictures))


def rate_beside(spoilt: int, levels: int, pictures: int, confidence: float = CONFIDENCE) -> float:
    """The rate that holds where `spoilt` of `pictures` pass a threshold that was set on them, and none of the others any of
    `levels` that were set on them as well.

    Pictures divide what is possible into n + 1 blocks, of which every level cuts off one, and the threshold one and `spoilt`
    more. How much so many blocks hold follows a Beta distribution, however many statistics they are cut by (Tukey 1947,
    "Non-parametric estimation II"); the rate is its quantile.
    """
    blocks = spoilt + 1 + levels
    return float(beta.ppf(confidence, blocks, pictures + 1 - blocks)) if blocks <= pictures else 1.0


def allowed_beside(levels: int, pictures: int, rate: float) -> int | None:
    """How many of `pictures` may fire for a promise of `rate` to hold beside so many levels; None where not even none would
    do."""
    most = allowed_exceedances(pictures, rate)
    return max((spoilt for spoilt in range(most + 1) if rate_beside(spoilt, levels, pictures) <= rate), default=None)


def bound(logits: npt.NDArray[np.float64], allowed: int) -> float:
    """The threshold that all but `allowed` of the runs stay below in every concept; logits [R, N], highest of each run.

    One bound for all concepts, whose scores are relative to what clean pictures come up to, so that the statistic is one
    number a picture.
    """
    highest = np.sort(logits.max(axis=1))[::-1][allowed] + MARGIN
    return float(1 / (1 + math.exp(-highest)))


def logit_of(threshold: float) -> float:
    """log(t / (1 - t))."""
    return math.log(threshold / (1 - threshold))


def calibrate(
    module: SafetyModule,
    leveling: RecordedRuns,
    runs: RecordedRuns,
    *,
    steps: int,
    guidance_scale: float,
    prompts: str,
    rate: float = RATE,
    level_prompts: Callable[[SafetyModule], None] | None = None,
) -> Promise:
    """Set levels by the benign pictures `leveling`, and thresholds to where the promise of `rate` holds on the others, `runs`;
    state the promise in the configuration of `module`, and return it. `level_prompts` sets its `prompt_levels` between the two.

    Where a step is looked at without the prompt, what it says together with all inputs has levels of its own (see
    `set_agreed_levels`), which the promise holds with (`rate_beside`), and which are left out where there are too few runs.

    Only the concepts trained last are calibrated: those which were there before they were added decide as they did, and the
    promise is for all together. Where those alone fire on as many pictures as may be, or more, the new ones are to fire on
    none, and a rate is promised that holds for both (`joint_rate`).

    Raises:
        RequestError: there are too few runs, or the concepts that were there before fire on far too many.
    """
    set_levels(module, leveling)
    if level_prompts is not None:
        level_prompts(module)
    own = len(module.last_branch.gains)
    before, last = module.config.concepts[:-own], module.config.concepts[-own:]
    allowed, agreeing = allowed_exceedances(len(runs.latent), rate), not before and module.last_branch.alone is not None
    if agreeing:
        fewer = allowed_beside(own, len(runs.latent), rate)
        agreeing, allowed = fewer is not None, allowed if fewer is None else fewer
        if not agreeing:
            log.warning("%d pictures are too few for levels of what two sources say together", len(runs.latent))
    logits = highest_logits(module, runs)
    fired = np.array([logit_of(concept.threshold) for concept in before])
    spoilt: npt.NDArray[np.bool_] = np.any(logits[:, :-own] >= fired, axis=1)
    if spoilt.sum() > allowed:
        allowed, rate = int(spoilt.sum()), round(joint_rate(int(spoilt.sum()), len(spoilt)), 6)
        fires = f"{', '.join(concept.name for concept in before)} fire on {allowed} of {len(spoilt)} pictures"
        if rate > WORST_RATE:
            raise RequestError(f"{fires}; calibrate the module that the concept was added to first")
        log.warning("%s: %.2g %% are promised for all concepts together", fires, 100 * rate)
    threshold = round(bound(logits[~spoilt, -own:], allowed - int(spoilt.sum())), 8)
    promise = Promise(
        rate=rate, confidence=CONFIDENCE, pictures=len(runs.latent), allowed=allowed,
        steps=steps, guidance_scale=guidance_scale, prompts=prompts,
    )  # fmt: skip
    concepts = tuple(replace(concept, threshold=threshold) for concept in last)
    module.config = replace(module.config, concepts=before + concepts, promise=promise)
    if agreeing:
        set_agreed_levels(module, runs)
    return promise
