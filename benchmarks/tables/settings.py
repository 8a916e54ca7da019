"""Is the concept gone however the picture is drawn? Every number of steps with every sampler, all concepts and both parts.

A combination alone has few pictures, each of a prompt of its own; shares are given over all combinations of a number of steps
and of a sampler. The judges' thresholds are those of pictures of the usual number of steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.drawing import PLAIN, Setting, Studio, plain_of
from benchmarks.tables.forgetting import PARTS, Judges
from benchmarks.test_sets import unsafe_set
from saferedir.runtime import Pipeline
from saferedir.runtime.schedulers import SCHEDULERS
from saferedir_torch.evaluation.intervals import clustered_share, share
from saferedir_torch.world.prompts import CONCEPTS
from saferedir_torch.world.split import Split

Bools = npt.NDArray[np.bool_]
STEPS = (8, 10, 12, 15, 25)
TEST_SEED = 200


@dataclass(frozen=True)
class Size:
    """Prompts of a concept, part and combination; numbers of steps, samplers; validation rewrites."""

    prompts: int = 10
    steps: tuple[int, ...] = STEPS
    schedulers: tuple[str, ...] = tuple(SCHEDULERS)
    rewrites: int = 1000


QUICK = Size(prompts=1, steps=(4, 5), schedulers=("ddim", "euler"), rewrites=12)


def picture_steps(size: Size) -> float:
    """Guided steps of one picture that are drawn, those of validation rewrites aside."""
    return 2 * size.prompts * len(CONCEPTS) * len(PARTS) * len(size.schedulers) * float(sum(size.steps))


@dataclass(frozen=True)
class _Cell:
    """What became of the pictures of one combination, concept and part that show the concept without safety."""

    setting: Setting
    concept: str
    part: str
    gone: Bools
    names: list[str]
    prompts: list[str]


def settings(studio: Studio, protected: Pipeline, identity: str, split: Split, size: Size) -> dict[str, Any]:
    """FSR by steps, by sampler, by both, and by concept, by the first judge; the combinations that are refused, and what was
    missed."""
    plain = plain_of(protected)
    judges = {name: Judges.calibrated(studio, plain, concept, split, size.rewrites) for name, concept in CONCEPTS.items()}
    cells: list[_Cell] = []
    every = list(product(size.steps, size.schedulers))
    # Names come in turn, so that a combination's part of the prompts begins where that of the one before ends.
    sets = {
        (name, part): unsafe_set(concept, split, part, size.prompts * len(every), 1, seed=TEST_SEED)
        for (name, concept), part in product(CONCEPTS.items(), PARTS)
    }
    missed: list[dict[str, Any]] = []
    shown, drawn, refused = 0, 0, dict[str, str]()
    for number, (steps, scheduler) in enumerate(every):
        setting = Setting(steps, scheduler=scheduler)
        if why := setting.refusal(protected):
            refused[f"{scheduler}, {steps} steps"] = why
            continue
        for (name, concept), part in product(CONCEPTS.items(), PARTS):
            tested = sets[name, part].rows(range(number * size.prompts, (number + 1) * size.prompts))
            title = f"{scheduler}, {steps} steps, {name}, {part}"
            before = studio.draw(plain, PLAIN, tested.prompts, tested.seeds, f"{title}: unprotected", setting)
            after = studio.draw(protected, identity, tested.prompts, tested.seeds, f"{title}: protected", setting)
            rows = np.flatnonzero(judges[name].found(before, concept))
            gone = ~judges[name].found(after, concept)[rows]
            shown, drawn = shown + len(rows), drawn + len(tested.pairs)
            cells.append(
                _Cell(setting, name, part, gone, [tested.names[row] for row in rows], [tested.prompts[row] for row in rows])
            )
            missed += [
                {"prompt": tested.prompts[row], "seed": tested.seeds[row], "steps": steps, "scheduler": scheduler,
                 "concept": name, "fired": bool(after.any_fired[row])}
                for row in rows[~gone]
            ]  # fmt: skip
    return {
        "shown_unprotected": share(shown, drawn),
        "fsr": {
            "all": _fsr(cells),
            "steps": {str(steps): _fsr([own for own in cells if own.setting.steps == steps]) for steps in size.steps},
            "scheduler": _by(cells, [own.setting.scheduler or "" for own in cells]),
            "concept": _by(cells, [f"{own.concept}, {own.part.replace('_', '-')}" for own in cells]),
            "combination": _by(cells, [f"{own.setting.scheduler}, {own.setting.steps}" for own in cells]),
        },
        "missed": missed,
        "refused": refused,
    }


def _by(cells: list[_Cell], keys: list[str]) -> dict[str, Any]:
    return {key: _fsr([cell for cell, own in zip(cells, keys, strict=True) if own == key]) for key in dict.fromkeys(keys)}


def _fsr(cells: list[_Cell]) -> dict[str, float]:
    """Over the pictures of `cells`; the interval's clusters are names."""
    gone = np.concatenate([own.gone for own in cells]) if cells else np.zeros(0, np.bool_)
    return clustered_share(gone, [name for own in cells for name in own.names], [text for own in cells for text in own.prompts])
