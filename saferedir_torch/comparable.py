"""Levels and gains of a branch that was taught, by the runs that training held out: what makes its scores comparable."""

from __future__ import annotations

import math

import torch
from msgspec import structs
from torch import Tensor

from saferedir_torch.learner import Learner
from saferedir_torch.safety_module import HIGHEST, KNOTS, REACH, TIMESTEPS, SafetyModule, near_knots

#: Share of clean steps that stay below the level of their timestep.
CLEAN_SHARE = 0.99
#: Share of held-out unsafe runs that need not reach the height which gains are set by.
MISSED_SHARE = 0.01
#: The same for latents alone, which some unsafe runs never show anything to.
UNSEEN_SHARE = 0.5
#: Unsafe runs that rise less above clean ones than this, in logits, are taken to rise this much.
SMALLEST_PEAK = 0.5


def make_comparable(module: SafetyModule, learner: Learner) -> None:
    """Set levels and gains of the last branch, and the thresholds of its concepts half-way between clean and unsafe runs,
    where they stay until calibration moves them."""
    branch, logits = module.last_branch, learner.held_logits()
    branch.levels.copy_(clean_levels(learner, logits))
    branch.prompt_levels.fill_(HIGHEST)
    if branch.alone is not None:
        branch.agreed_levels.fill_(HIGHEST)
    branch.gains.copy_(REACH / unsafe_peaks(learner, logits, branch.levels, MISSED_SHARE))
    own = len(branch.gains)
    threshold = round(1 / (1 + math.exp(-REACH / 2)), 6)
    named = tuple(structs.replace(concept, threshold=threshold) for concept in module.config.concepts[-own:])
    module.config = structs.replace(module.config, concepts=module.config.concepts[:-own] + named)


def make_comparable_alone(module: SafetyModule, learner: Learner) -> None:
    """The same of levels and gains for steps without the prompt, where half of the unsafe runs are to rise so far."""
    branch, logits = module.last_branch, learner.held_logits(alone=True)
    branch.alone_levels.copy_(clean_levels(learner, logits))
    branch.agreed_levels.fill_(HIGHEST)
    branch.alone_gains.copy_(REACH / unsafe_peaks(learner, logits, branch.alone_levels, UNSEEN_SHARE))


def clean_levels(learner: Learner, logits: Tensor) -> Tensor:
    """Per concept and knot of the timestep, the logit that 99 % of held-out clean steps around it stay below: logits [S, N] ->
    [N, KNOTS].

    A step is clean if the prompt does not ask for the concept and the latent does not show it.
    """
    bank, rows = learner.bank.to("cpu"), learner.held_rows.cpu()
    levels = torch.zeros(logits.shape[1], KNOTS)
    spacing = TIMESTEPS / (KNOTS - 1)
    for knot in range(KNOTS):
        near = (bank.timestep[rows] - knot * spacing).abs() <= spacing
        for index in range(logits.shape[1]):
            clean = near & (bank.asked[rows, index] == 0) & (bank.shown[rows, index] == 0)
            if clean.any():
                levels[index, knot] = torch.quantile(logits[clean, index], CLEAN_SHARE)
    return levels


def unsafe_peaks(learner: Learner, logits: Tensor, levels: Tensor, missed: float) -> Tensor:
    """Per concept, how far above `levels` [N, KNOTS] all but a share `missed` of held-out unsafe runs rise in some step:
    logits [S, N] -> [N]."""
    bank, rows = learner.bank.to("cpu"), learner.held_rows.cpu()
    above = logits - near_knots(bank.timestep[rows]) @ levels.T.cpu()
    peaks = torch.full((above.shape[1],), REACH)
    for index in range(above.shape[1]):
        unsafe = torch.unique(bank.run[rows][bank.asked[rows, index] > 0])
        if len(unsafe):
            highest = torch.stack([above[bank.run[rows] == run, index].max() for run in unsafe])
            peaks[index] = torch.quantile(highest, missed)
    return peaks.clamp(min=SMALLEST_PEAK)
