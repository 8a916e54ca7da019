"""Rest after firing: how often the decision flips from step to step, and what it does to the picture, for K from 0 to 10."""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.drawing import PLAIN, Studio
from benchmarks.hybrid import hybrid_pipeline
from benchmarks.tables.forgetting import Judges, companion_kept, has_companion, plain_of
from benchmarks.test_sets import unsafe_set
from saferedir.runtime import SafetyPolicy
from saferedir_torch.evaluation.features import Features
from saferedir_torch.evaluation.intervals import clustered_mean, clustered_share, share
from saferedir_torch.safety_module import SafetyModule
from saferedir_torch.world.prompts import CONCEPTS
from saferedir_torch.world.split import Split

PERIODS = (0, 1, 2, 3, 5, 7, 10)
FULL, QUICK = 100, 2


def cooldown(
    studio: Studio, module: SafetyModule, identity: str, split: Split, features: Features, count: int, rewrites: int
) -> dict[str, Any]:
    """Per concept (held-out names) and K: flips of `score >= threshold` over the steps, firings, FSR, companion, LPIPS."""
    figures: dict[str, Any] = {"measures": features.names, "concepts": {}}
    for index, (name, concept) in enumerate(CONCEPTS.items()):
        tested = unsafe_set(concept, split, "held_out", count, 1, seed=4)
        plain = plain_of(hybrid_pipeline(module))
        judges = Judges.calibrated(studio, plain, concept, split, rewrites)
        before = studio.draw(plain, PLAIN, tested.prompts, tested.seeds, f"{name}: unprotected")
        rewrite = studio.draw(plain, PLAIN, [pair.safe for pair in tested.pairs], tested.seeds, f"{name}: rewrite")
        shown = judges.found(before, concept)
        names, prompts = np.array(tested.names)[shown].tolist(), np.array(tested.prompts)[shown].tolist()
        companions = [row for row, pair in enumerate(tested.pairs) if has_companion(pair)]
        rows = []
        for period in PERIODS:
            pipeline = hybrid_pipeline(module, policy=SafetyPolicy(cooldown=period))
            after = studio.draw(pipeline, identity, tested.prompts, tested.seeds, f"{name}: K = {period}")
            unsafe = after.score[:, :, index] >= pipeline.policy.threshold[index]
            flips = (unsafe[:, 1:] != unsafe[:, :-1]).sum(axis=1)
            opinion = judges.judges["judge"].judge(after.pictures)
            kept = sum(companion_kept(opinion, row, tested.pairs[row]) for row in companions)
            distance = features.perceptual.distance(after.pictures, rewrite.pictures).double().numpy()
            rows.append({
                "cooldown": period,
                "fsr": clustered_share(~judges.found(after, concept)[shown], names, prompts),
                "flips_a_picture": float(flips.mean()),
                # From unsafe to safe is the redirection at work; back again is oscillation.
                "oscillating": share(int((flips >= 2).sum()), count),
                "firings_a_picture": float(after.fired.any(axis=2).sum(axis=1).mean()),
                "never_fired": share(int((~after.any_fired).sum()), count),
                "companion": share(kept, len(companions)),
                features.names[1]: clustered_mean(distance[shown], names, prompts),
            })  # fmt: skip
        figures["concepts"][name] = rows
    return figures
