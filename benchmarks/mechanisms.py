"""The mechanisms of the rule, each of which can be left out of the shipped module: what the ablation's rows are made of."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from msgspec.structs import replace
from torch import nn

from benchmarks.hybrid import hybrid_pipeline
from saferedir.runtime import Pipeline
from saferedir_torch.calibration import calibrate
from saferedir_torch.command_line.benign_prompts import benign_prompts
from saferedir_torch.controller import Controller
from saferedir_torch.models import load_pipeline
from saferedir_torch.recording import RecordedRuns, record
from saferedir_torch.safety_module import HIGHEST, SafetyModule

#: Benign pictures that levels and thresholds are set on, as the shipped module's were.
LEVELS, BOUND = 2400, 7752


@dataclass(frozen=True)
class Mechanism:
    """One part of the rule."""

    title: str
    #: Takes it out of a copy of the shipped module, in place, and gives what stands before the denoiser. Calibration is not to
    #: bring back what it took out.
    leave_out: Callable[[SafetyModule], nn.Module]
    #: Whether scores change without it, so that thresholds are to be set again to the same promise.
    scored: bool = True


def _without_fallback(module: SafetyModule) -> nn.Module:
    module.config = replace(module.config, refuge=False)
    return Controller(module)


def _without_vigilance(module: SafetyModule) -> nn.Module:
    module.config = replace(module.config, vigilance=1.0)
    return Controller(module)


def without_words(module: SafetyModule) -> nn.Module:
    """It hears what the picture shows alone."""
    for branch in module.each_branch():
        branch.levels.fill_(HIGHEST)
        branch.prompt_levels.fill_(HIGHEST)
    return Controller(module)


def without_picture(module: SafetyModule) -> nn.Module:
    """It hears nothing of what the picture shows but together with the words."""
    for branch in module.each_branch():
        if branch.alone is not None:
            branch.alone_levels.fill_(HIGHEST)
            branch.agreed_levels.fill_(HIGHEST)
    return Controller(module)


def by_picture(shipped: SafetyModule) -> tuple[str, Pipeline]:
    """Identity and pipeline of the shipped safety where it does not hear the words."""
    module = copy.deepcopy(shipped)
    controller = without_words(module)
    return f"{module.sha256()} without words", hybrid_pipeline(module, controller=controller)


MECHANISMS = (
    Mechanism("the fallback", _without_fallback, scored=False),
    Mechanism("firing again somewhat below the threshold", _without_vigilance, scored=False),
    Mechanism("what the picture shows alone", without_picture, scored=False),
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
    """Set thresholds to the promise that the shipped module states, on pictures of `python -m saferedir_torch calibrate`."""
    promise = module.config.promise
    assert promise is not None
    mechanism.leave_out(module)
    leveling, runs = (_recorded(recorded / name, count, stream) for name, count, stream in
                      (("levels", LEVELS, 1), ("bound", BOUND, 0)))  # fmt: skip
    calibrate(
        module, leveling, runs,
        steps=promise.steps, guidance_scale=promise.guidance_scale, prompts=promise.prompts, rate=promise.rate,
    )  # fmt: skip


def _recorded(folder: Path, count: int, stream: int) -> RecordedRuns:
    texts, seeds, _ = benign_prompts(None, count, stream, [])
    return record(load_pipeline(), texts, seeds, steps=25, guidance_scale=5.0, folder=folder)
