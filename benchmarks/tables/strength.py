"""How far to move: fixed strengths against the adaptive one, on names never seen."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.drawing import PLAIN, Studio
from benchmarks.hybrid import hybrid_pipeline
from benchmarks.tables.forgetting import Judges, companion_kept, has_companion, plain_of
from benchmarks.test_sets import unsafe_set
from saferedir.runtime import SafetyPolicy
from saferedir_torch.evaluation.features import Features
from saferedir_torch.evaluation.intervals import bootstrap, clustered_mean, clustered_share, share
from saferedir_torch.safety_module import SafetyModule
from saferedir_torch.world.prompts import CONCEPTS
from saferedir_torch.world.split import Split

STRENGTHS = (0.5, 1.0, 1.25, 1.5, 2.0, 2.5, 3.0)
FULL, QUICK = 150, 2


def fixed(module: SafetyModule) -> SafetyModule:
    """`module` without the part of its strength that answers to the trajectory: firing again changes nothing."""
    other = copy.deepcopy(module)
    other.config = replace(module.config, persistence=1.0)
    return other


def strength(
    studio: Studio, module: SafetyModule, identity: str, split: Split, features: Features, count: int, rewrites: int
) -> dict[str, Any]:
    """Per concept: FSR, LPIPS and FID to the rewrite for every fixed `alpha_scale` and for the adaptive strength, and
    whether a fixed one is better on both (paired bootstrap over names and prompts)."""
    figures: dict[str, Any] = {"measures": features.names, "concepts": {}}
    for name, concept in CONCEPTS.items():
        tested = unsafe_set(concept, split, "held_out", count, 1, seed=4)
        plain = plain_of(hybrid_pipeline(module))
        judges = Judges.calibrated(studio, plain, concept, split, rewrites)
        before = studio.draw(plain, PLAIN, tested.prompts, tested.seeds, f"{name}: unprotected")
        safe = [pair.safe for pair in tested.pairs]
        rewrite = studio.draw(plain, PLAIN, safe, tested.seeds, f"{name}: rewrite")
        shown = judges.found(before, concept)
        names, prompts = np.array(tested.names)[shown].tolist(), np.array(tested.prompts)[shown].tolist()
        rows: list[dict[str, Any]] = []
        outcomes: list[npt.NDArray[np.float64]] = []
        ways = [
            (f"fixed {scale:g}", fixed(module), SafetyPolicy(alpha_scales=dict.fromkeys(CONCEPTS, scale)))
            for scale in STRENGTHS
        ]
        for title, variant, policy in [*ways, ("adaptive", module, SafetyPolicy())]:
            key = f"{identity}-{variant.config.persistence:g}"
            after = studio.draw(hybrid_pipeline(variant, policy=policy), key, tested.prompts, tested.seeds, f"{name}: {title}")
            gone = ~judges.found(after, concept)[shown]
            distance = features.perceptual.distance(after.pictures, rewrite.pictures).double().numpy()
            opinion = judges.judges["judge"].judge(after.pictures)
            companions = [row for row, pair in enumerate(tested.pairs) if has_companion(pair)]
            kept = sum(companion_kept(opinion, row, tested.pairs[row]) for row in companions)
            rows.append({
                "strength": title,
                "fsr": clustered_share(gone, names, prompts),
                "companion": share(kept, len(companions)),
                features.names[1]: clustered_mean(distance[shown], names, prompts),
                features.names[2]: features.frechet_distance(rewrite.pictures, after.pictures),
            })  # fmt: skip
            outcomes.append(np.stack([gone.astype(float), distance[shown]], axis=1))
        comparisons = [
            {"strength": row["strength"], **_better(fixed_outcome, outcomes[-1], names, prompts)}
            for row, fixed_outcome in zip(rows, outcomes[:-1], strict=False)
        ]
        figures["concepts"][name] = {"rows": rows, "against_adaptive": comparisons}
    return figures


def _better(
    fixed_outcome: npt.NDArray[np.float64], adaptive: npt.NDArray[np.float64], names: list[str], prompts: list[str]
) -> dict[str, Any]:
    """How much better a fixed strength is: FSR gained and LPIPS saved, with 95 % intervals of the paired difference."""
    difference = np.stack([fixed_outcome[:, 0] - adaptive[:, 0], adaptive[:, 1] - fixed_outcome[:, 1]], axis=1)
    result: dict[str, Any] = {}
    for column, title in enumerate(("fsr_gained", "distance_saved")):
        drawn = bootstrap(difference[:, column], names, prompts, lambda values: float(values.mean()))
        low, high = np.quantile(drawn, (0.025, 0.975))
        result[title] = {"mean": float(difference[:, column].mean()), "low": float(low), "high": float(high)}
    result["better_on_both"] = bool(result["fsr_gained"]["low"] > 0 and result["distance_saved"]["low"] > 0)
    return result
