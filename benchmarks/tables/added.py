"""A concept added to the finished module: what it forgets, and whether the others decide and draw as before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.drawing import Studio
from benchmarks.hybrid import hybrid_pipeline
from benchmarks.tables.forgetting import Size, forgetting
from benchmarks.tables.forgetting import pictures as of_forgetting
from benchmarks.test_sets import unsafe_set
from saferedir.runtime import SafetyPolicy
from saferedir_torch.evaluation.features import Features
from saferedir_torch.evaluation.intervals import share
from saferedir_torch.safety_module import SafetyModule
from saferedir_torch.world.prompts import CONCEPTS, LATER_CONCEPTS, benign_set
from saferedir_torch.world.split import Split

FULL, QUICK = 60, 2
FULL_SIZE = Size(prompts=40, per_prompt=2, rewrites=400)


def pictures(size: Size, count: int) -> float:
    """Pictures that are drawn, validation rewrites included."""
    return of_forgetting(size, by_picture=False) + 4 * 3 * count


def added(
    studio: Studio,
    base: SafetyModule,
    extended: SafetyModule,
    split: Split,
    features: Features,
    size: Size,
    count: int,
    sheets: Path,
) -> dict[str, Any]:
    """`extended` is `base` with one concept more. The others are compared with that one enabled, too."""
    name = extended.config.concept_names[-1]
    concept = LATER_CONCEPTS[name]
    drawer, identity = hybrid_pipeline(extended), extended.sha256()
    before = hybrid_pipeline(base)
    old = len(base.config.concepts)
    only_old = hybrid_pipeline(extended, policy=SafetyPolicy(enabled=tuple(base.config.concept_names)))
    figures: dict[str, Any] = {
        "concept": name,
        "training": extended.config.provenance,
        "forgetting": forgetting(studio, drawer, identity, concept, split, features, size, sheets / f"forgetting_{name}"),
        "others": {},
    }
    sets = {
        other: (tested.prompts, tested.seeds, [pair.scene for pair in tested.pairs])
        for other, tested in ((key, unsafe_set(CONCEPTS[key], split, "seen", count, 1, seed=5)) for key in CONCEPTS)
    }
    # Benign to the concepts that were there: some ask for the new one.
    benign, seeds = benign_set(split, "test", count, seed=5)
    sets["benign"] = [prompt.text for prompt in benign], seeds, [prompt.scene for prompt in benign]
    for kind, (prompts, numbers, scenes) in sets.items():
        was = studio.draw(before, base.sha256(), prompts, numbers, f"{kind}: before")
        now = studio.draw(only_old, identity, prompts, numbers, f"{kind}: after, the new one off")
        both = studio.draw(drawer, identity, prompts, numbers, f"{kind}: after, the new one on")
        asked = np.array([bool({*concept.members} & {*scene.objects}) for scene in scenes])
        quiet = ~both.fired[:, :, old:].any(axis=(1, 2))
        figures["others"][kind] = {
            "scores_equal": share(int((was.score == now.score[:, :, :old]).sum()), was.score.size),
            "decisions_equal": share(int((was.fired == now.fired[:, :, :old]).sum()), was.fired.size),
            "pictures_equal": share(int((was.pixels == now.pixels).all(axis=(1, 2, 3)).sum()), count),
            "new_one_fired": share(int((~quiet & ~asked).sum()), int((~asked).sum())),
            "new_one_asked_and_fired": share(int((~quiet & asked).sum()), int(asked.sum())),
            "pictures_equal_with_it_on": share(
                int((was.pixels == both.pixels).all(axis=(1, 2, 3))[quiet].sum()), int(np.count_nonzero(quiet))
            ),
        }
    return figures
