"""How far each concept is moved, chosen on validation pictures: the least strength that leaves no more than the rewrite."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import numpy.typing as npt
from msgspec.structs import replace

from benchmarks.drawing import PLAIN, Drawn, Studio
from benchmarks.hybrid import hybrid_pipeline
from benchmarks.report import NETWORKS
from benchmarks.tables.forgetting import plain_of
from saferedir.runtime import SafetyPolicy
from saferedir_torch.evaluation.features import Features
from saferedir_torch.safety_module import SafetyModule
from saferedir_torch.world.judge import Judge
from saferedir_torch.world.prompts import CONCEPTS, WorldConcept, training_pair
from saferedir_torch.world.split import Split

#: The first is what training is for.
STRENGTHS = (1.5, 1.65, 1.8, 2.0, 2.2)
FULL, QUICK = 384, 2
#: A judge's score from which a picture is counted: well below where the concept counts as found, which too few pictures reach.
HINTS = 0.1
SEED = 91


def strength_choice(studio: Studio, shipped: SafetyModule, split: Split, features: Features, count: int) -> dict[str, Any]:
    """Per concept, strength after strength until one is chosen: pictures of `count` in which each judge sees a hint of the
    concept, beside those of the rewrite, and LPIPS to the rewrite.

    Chosen is the least strength at which neither judge sees hints more often than in the rewrites; None where none is. All
    scales in `shipped` are taken for what training is for, so that the choice does not depend on an earlier one.
    """
    module = copy.deepcopy(shipped)
    as_trained = tuple(replace(one, alpha_scale=STRENGTHS[0]) for one in module.config.concepts)
    module.config = replace(module.config, concepts=as_trained)
    judges = {name: Judge.load(NETWORKS / name) for name in ("judge", "second_judge")}
    figures: dict[str, Any] = {"hints_from": HINTS, "measure": features.names[1], "concepts": {}}
    for name, concept in CONCEPTS.items():
        rng = np.random.default_rng([SEED, 1])
        pairs = [training_pair(concept, rng, split) for _ in range(count)]
        seeds = [int(seed) for seed in rng.integers(*split.seeds["validation"], size=count)]
        safe = [pair.safe for pair in pairs]
        rewrite = studio.draw(plain_of(hybrid_pipeline(module)), PLAIN, safe, seeds, f"{name}: rewrite")
        allowed = _hints(judges, rewrite, concept)
        rows: list[dict[str, Any]] = []
        chosen: float | None = None
        for strength in STRENGTHS:
            drawer = hybrid_pipeline(module, policy=SafetyPolicy(alpha_scales={name: strength}))
            drawn = studio.draw(drawer, module.sha256(), [pair.unsafe for pair in pairs], seeds, f"{name}: {strength:g}")
            hints = _hints(judges, drawn, concept)
            distance: npt.NDArray[np.float64] = features.perceptual.distance(drawn.pictures, rewrite.pictures).double().numpy()
            rows.append({"strength": strength, "hints": hints, features.names[1]: float(distance.mean())})
            if all(hints[judge] <= allowed[judge] for judge in judges):
                chosen = strength
                break
        figures["concepts"][name] = {"pictures": count, "rewrite_hints": allowed, "rows": rows, "chosen": chosen}
    return figures


def _hints(judges: dict[str, Judge], drawn: Drawn, concept: WorldConcept) -> dict[str, int]:
    return {name: int((judge.judge(drawn.pictures).of(concept.shown_by) > HINTS).sum()) for name, judge in judges.items()}
