"""The mechanisms of the rule, each of which can be left out of the shipped module: what the ablation's rows are made of."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from msgspec.structs import replace
from torch import Tensor, nn

from benchmarks.hybrid import hybrid_pipeline
from saferedir.runtime import Pipeline
from saferedir_torch.calibration import set_thresholds
from saferedir_torch.command_line.benign_prompts import benign_prompts
from saferedir_torch.controller import Controller, Guided, Policy, Seen, State, Verdict
from saferedir_torch.models import load_pipeline
from saferedir_torch.runs import benign_runs
from saferedir_torch.safety_module import Redirected, SafetyModule, Scored

#: Benign pictures that thresholds are set on, as the shipped module's were.
BOUND = 6294
#: Above any log-odds.
HIGHEST = 1e4


@dataclass(frozen=True)
class Mechanism:
    """One part of the rule."""

    title: str
    #: Takes it out of a copy of the shipped module, in place, and gives what stands before the denoiser. Calibration is not to
    #: bring back what it took out.
    leave_out: Callable[[SafetyModule], nn.Module]
    #: Whether scores change without it, so that thresholds are to be set again to the same promise.
    scored: bool = True


class _NeverFallsBack(SafetyModule):
    def redirect(self, scored: Scored, original: Sequence[Tensor], active: Tensor, again: Tensor) -> Redirected:
        return super().redirect(scored, original, active, torch.zeros_like(again))


class _Unamplified(Controller):
    def forward(self, seen: Seen, original: Tensor, guided: Guided, state: State, policy: Policy) -> tuple[State, Verdict]:
        unamplified = guided._replace(amplification=torch.zeros_like(guided.amplification))
        return super().forward(seen, original, unamplified, state, policy)


def _without_fallback(module: SafetyModule) -> nn.Module:
    module.__class__ = _NeverFallsBack
    return Controller(module)


def _without_rest(module: SafetyModule) -> nn.Module:
    module.config = replace(module.config, cooldown=0)
    return Controller(module)


def without_words(module: SafetyModule) -> nn.Module:
    """It hears what the picture shows alone."""
    for branch in module.each_branch():
        branch.centre[0, : len(branch.keeps_subject)] = HIGHEST
    return Controller(module)


def without_picture(module: SafetyModule) -> nn.Module:
    """It hears nothing of what the picture shows but together with the words."""
    for branch in module.each_branch():
        branch.centre[0, len(branch.keeps_subject) :] = HIGHEST
    return Controller(module)


def _without_single_words(module: SafetyModule) -> nn.Module:
    for branch in module.each_branch():
        branch.detector.words.bias.data.fill_(-HIGHEST)
    return Controller(module)


def _without_centre(module: SafetyModule) -> nn.Module:
    for branch in module.each_branch():
        branch.centre.zero_()
    return Controller(module)


def by_picture(shipped: SafetyModule) -> tuple[str, Pipeline]:
    """Identity and pipeline of the shipped safety where it does not hear the words."""
    module = copy.deepcopy(shipped)
    controller = without_words(module)
    return f"{module.sha256()} without words", hybrid_pipeline(module, controller=controller)


MECHANISMS = (
    Mechanism("what the picture shows alone", without_picture),
    Mechanism("what single words say", _without_single_words),
    Mechanism("centring by noise level", _without_centre),
    Mechanism("reading what guidance amplifies", _Unamplified),
    Mechanism("the fallback", _without_fallback, scored=False),
    Mechanism("rest after firing", _without_rest, scored=False),
)


def left_out(shipped: SafetyModule, mechanism: Mechanism, recorded: Path | None) -> tuple[str, nn.Module, SafetyModule]:
    """The shipped module without `mechanism`: identity for drawings, controller, module.

    `recorded` is the folder of benign trajectories on which its thresholds are set again where scores have changed; without it
    they stay as they are.
    """
    module = copy.deepcopy(shipped)
    if mechanism.scored and recorded is not None:
        _recalibrate(module, mechanism, recorded)
    controller = mechanism.leave_out(module)
    return f"{module.sha256()} without {mechanism.title}", controller.eval(), module


def _recalibrate(module: SafetyModule, mechanism: Mechanism, recorded: Path) -> None:
    """Set thresholds to the promise that the shipped module states, on pictures of `saferedir calibrate`."""
    promise = module.config.promise
    assert promise is not None
    mechanism.leave_out(module)
    texts, seeds, _ = benign_prompts(None, BOUND, 0, [])
    runs = benign_runs(load_pipeline(), texts, seeds, recorded / "bound", seed=0, envelope=promise.envelope)
    set_thresholds(module, runs, envelope=promise.envelope, prompts=promise.prompts, rate=promise.rate)
