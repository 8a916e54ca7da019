"""Centring, and thresholds with a promise on false alarms, by split conformal prediction on benign pictures.

Some pictures first say how high log-odds come at each noise level; the statistic is relative to that from then on. Others,
which had no part in it, set the bound.

The steps of one picture depend on each other, and a picture is spoilt if any concept fires in any step. So the unit is the
picture, and its statistic is the highest over steps and concepts. If at most k of n exchangeable benign pictures
reach a bound, the share of all such pictures that do is below a rate r with confidence 1 - P(Binomial(n, r) <= k).
"""

from __future__ import annotations

import logging
import math

import numpy as np
import numpy.typing as npt
import torch
from msgspec.structs import replace
from scipy.stats import beta, binom
from torch import Tensor

from saferedir.engines.errors import RequestError
from saferedir.engines.manifest import Envelope, Promise
from saferedir_torch.controller import amplification
from saferedir_torch.detector import KNOTS, Step, bends
from saferedir_torch.estimate import shown_estimate
from saferedir_torch.runs import RunBank
from saferedir_torch.safety_module import SafetyModule

log = logging.getLogger("saferedir")

RATE = 0.001
CONFIDENCE = 0.95
#: No larger rate is promised for added concepts and those before them.
WORST_RATE = 0.01
#: Share of benign pictures whose log-odds are taken for the tail, and how rarely one is to come up to its level.
TAIL, RARE = 0.02, 2e-4
#: The bound lies this far above the highest statistic that is to stay below it.
MARGIN = 1e-3
CHUNK = 512


class Seen:
    """What the branches of a module make of every step of recorded runs, before centring."""

    def __init__(self, module: SafetyModule, bank: RunBank) -> None:
        told, shown = [], []
        with torch.no_grad():
            for rows in torch.split(torch.arange(len(bank.run)), CHUNK):
                both = _answers(module, bank, rows)
                told.append(both[0])
                shown.append(both[1])
        #: Log-odds with the conditioning and without, [S, N].
        self.told, self.shown = torch.cat(told), torch.cat(shown)
        self.bank = bank

    def statistic(self, module: SafetyModule) -> Tensor:
        """By the present centring of `module`, [S, N]."""
        above = bends(self.bank.share)
        levels = torch.cat([branch.levels(above.to(branch.centre.device)).cpu() for branch in module.each_branch()], dim=1)
        sizes, start, of_told, of_shown = module.config.branch_sizes, 0, [], []
        for size in sizes:
            of_told.append(levels[:, start : start + size])
            of_shown.append(levels[:, start + size : start + 2 * size])
            start += 2 * size
        told, shown = self.told - torch.cat(of_told, dim=1), self.shown - torch.cat(of_shown, dim=1)
        return torch.where((shown > told) & ~self.bank.first[:, None], shown, told)

    def highest(self, of_steps: Tensor) -> Tensor:
        """The highest of each run, of values [S, N]: [R, N]."""
        return self.bank.highest(of_steps)


def set_centre(module: SafetyModule, seen: Seen) -> None:
    """Centre the branch trained last by benign runs: at each knot by what a picture comes up to once in 5,000.

    That is read off the tail, so that it is about as rare for every concept, answer and noise level, however far tails reach:
    one bound for all then costs each the same. At last a concept's levels are moved alike, so that its pictures come up above
    them at the promised rate, by their own tail: of more noise levels, or of heavier tails, one concept has more than another.
    """
    branch, own = module.last_branch, len(module.last_branch.keeps_subject)
    levels = []
    for answer, known in ((seen.told, torch.ones_like(seen.bank.first)), (seen.shown, ~seen.bank.first)):
        levels += _levels(seen, answer[:, -own:], known)
    branch.centre.copy_(piecewise_linear(torch.stack(levels, dim=1)))
    above = tail_level(seen.highest(seen.statistic(module)[:, -own:]), RATE)
    # Rounded as it will be on disk, so that the bound is for what is stored.
    branch.centre[0] += torch.cat([above, above]).to(branch.centre)
    branch.centre.copy_(branch.centre.half())


def piecewise_linear(values: Tensor) -> Tensor:
    """Values at noise shares 0, 1 / KNOTS, ... 1, [KNOTS + 1, A] -> the value at 0, and how the slope changes at each knot but
    the last, [KNOTS + 1, A]."""
    slopes = values.diff(dim=0) * KNOTS
    return torch.cat([values[:1], slopes[:1], slopes.diff(dim=0)])


def _levels(seen: Seen, answer: Tensor, known: Tensor) -> list[Tensor]:
    """Of every concept in `answer` [S, N] the level at each knot, [KNOTS + 1] each, by the steps near it that are `known`."""
    knots = torch.arange(KNOTS + 1) / KNOTS
    near = ((seen.bank.share[:, None] - knots).abs() <= 1 / KNOTS) & known[:, None]
    at_knots = []
    for index in range(KNOTS + 1):
        highest = seen.highest(torch.where(near[:, index, None], answer, -math.inf))
        some = highest[torch.isfinite(highest).all(dim=1)]
        at_knots.append(tail_level(some) if len(some) else torch.full((answer.shape[1],), math.nan))
    levels = torch.stack(at_knots)
    for index in range(1, KNOTS + 1):  # where nothing was drawn, as before it
        levels[index] = torch.where(levels[index].isnan(), levels[index - 1], levels[index])
    for index in range(KNOTS - 1, -1, -1):
        levels[index] = torch.where(levels[index].isnan(), levels[index + 1], levels[index])
    if levels.isnan().any():
        raise RequestError(f"{int(seen.bank.run.max()) + 1} benign pictures are too few to centre by; record more")
    return list(levels.T)


def tail_level(reached: Tensor, rate: float = RARE) -> Tensor:
    """What a share `rate` of cases reaches, from R of them along the first dimension, by an exponential tail.

    Of the highest share `TAIL` the mean excess over its beginning is the tail's scale.
    """
    begins = torch.quantile(reached, 1 - TAIL, dim=0)
    excess = torch.relu(reached - begins)
    scale = excess.sum(dim=0) / (excess > 0).sum(dim=0).clamp(min=1)
    return begins + scale * math.log(TAIL / rate)


def _answers(module: SafetyModule, bank: RunBank, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Log-odds of the steps `rows` with the conditioning and without, not centred, [S, N] each."""
    device = next(module.parameters()).device
    estimate = torch.where(bank.first[rows, None, None, None], 0.0, shown_estimate(bank.denoised[rows]))
    step = Step(bank.latent[rows].float().to(device), estimate.to(device), bank.share[rows].to(device))
    features = module.features(step)
    amount = torch.tensor([amplification(float(scale)) for scale in bank.guidance[rows]])[:, None, None]
    prompt, negative = (bank.prompts[index[rows]].float() for index in (bank.prompt, bank.negative))
    drawn, in_force = ([one.to(device)] for one in (prompt + amount * (prompt - negative), prompt))
    told, shown = [], []
    for branch in module.each_branch():
        context = branch.read(features.joint[: len(rows)], drawn).context
        answers = branch.detector(features.joint, context, branch.conditioning(in_force))
        told.append(answers.told.cpu())
        shown.append(answers.shown.cpu())
    return torch.cat(told, dim=1), torch.cat(shown, dim=1)


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


def bound(statistic: npt.NDArray[np.float64], allowed: int) -> float:
    """The threshold that all but `allowed` of the runs stay below in every concept; statistic [R, N], highest of each run.

    One bound for all concepts, whose statistics are relative to what clean pictures come up to, so that there is one number a
    picture.
    """
    highest = np.sort(statistic.max(axis=1))[::-1][allowed] + MARGIN
    return float(1 / (1 + math.exp(-highest)))


def deciles(statistic: npt.NDArray[np.float64]) -> tuple[float, ...]:
    """Nine deciles of the pictures' highest scores; statistic [R, N], highest of each run."""
    score = 1 / (1 + np.exp(-statistic.max(axis=1)))
    return tuple(round(float(value), 8) for value in np.quantile(score, np.arange(1, 10) / 10))


def logit_of(threshold: float) -> float:
    """log(t / (1 - t))."""
    return math.log(threshold / (1 - threshold))


def calibrate(
    module: SafetyModule, centring: RunBank, runs: RunBank, *, envelope: Envelope, prompts: str, rate: float = RATE
) -> Promise:
    """Centre by the benign pictures `centring`, and set thresholds to where the promise of `rate` holds on the others, `runs`;
    state the promise in the configuration of `module`, and return it.

    Only the concepts trained last are calibrated: those which were there before they were added decide as they did, and the
    promise is for all together. Where those alone fire on as many pictures as may be, or more, the new ones are to fire on
    none, and a rate is promised that holds for both (`joint_rate`).

    Raises:
        RequestError: there are too few runs, or the concepts that were there before fire on far too many.
    """
    set_centre(module, Seen(module, centring))
    return set_thresholds(module, runs, envelope=envelope, prompts=prompts, rate=rate)


def set_thresholds(module: SafetyModule, runs: RunBank, *, envelope: Envelope, prompts: str, rate: float = RATE) -> Promise:
    """The second half of `calibrate`, of a module that is centred."""
    own = len(module.last_branch.keeps_subject)
    before, last = module.config.concepts[:-own], module.config.concepts[-own:]
    pictures = int(runs.run.max()) + 1
    allowed = allowed_exceedances(pictures, rate)
    seen = Seen(module, runs)
    highest = seen.highest(seen.statistic(module)).double().numpy()
    fired = np.array([logit_of(concept.threshold) for concept in before])
    spoilt: npt.NDArray[np.bool_] = np.any(highest[:, :-own] >= fired, axis=1)
    if spoilt.sum() > allowed:
        allowed, rate = int(spoilt.sum()), round(joint_rate(int(spoilt.sum()), len(spoilt)), 6)
        fires = f"{', '.join(concept.name for concept in before)} fire on {allowed} of {len(spoilt)} pictures"
        if rate > WORST_RATE:
            raise RequestError(f"{fires}; calibrate the module that the concept was added to first")
        log.warning("%s: %.2g %% are promised for all concepts together", fires, 100 * rate)
    threshold = round(bound(highest[~spoilt, -own:], allowed - int(spoilt.sum())), 8)
    promise = Promise(
        rate=rate, confidence=CONFIDENCE, pictures=pictures, allowed=allowed, envelope=envelope, prompts=prompts,
        deciles=deciles(highest),
    )  # fmt: skip
    concepts = tuple(replace(concept, threshold=threshold) for concept in last)
    module.config = replace(module.config, concepts=before + concepts, promise=promise)
    return promise
