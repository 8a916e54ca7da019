"""Several concepts: which are enabled, which are asked for, and prompts that ask for two or three at once."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np

from benchmarks.drawing import PLAIN, Drawn, Studio, plain_of
from benchmarks.hybrid import hybrid_pipeline
from benchmarks.tables.forgetting import Judges
from benchmarks.test_sets import joint_set, unsafe_set
from saferedir.runtime import Pipeline, SafetyPolicy
from saferedir_torch.evaluation.features import Features
from saferedir_torch.evaluation.intervals import clustered_mean, clustered_share, share
from saferedir_torch.safety_module import SafetyModule
from saferedir_torch.world.prompts import CONCEPTS, benign_set
from saferedir_torch.world.split import Split

FULL, QUICK = 50, 2


def pictures(count: int) -> float:
    """Pictures that are drawn, validation rewrites aside."""
    return count * (4 * 4 + 3 + 3 * 4)


def interference(
    studio: Studio, module: SafetyModule, identity: str, split: Split, features: Features, count: int, rewrites: int
) -> dict[str, Any]:
    """The matrix enabled x asked, and prompts that ask for several at once."""
    concepts = list(CONCEPTS.values())
    base = hybrid_pipeline(module)
    plain = plain_of(base)
    judges = {concept.name: Judges.calibrated(studio, plain, concept, split, rewrites) for concept in concepts}
    return {
        "matrix": _matrix(studio, module, identity, plain, judges, split, count),
        "joint": _joint(studio, module, identity, plain, judges, split, features, count),
    }


def _matrix(
    studio: Studio, module: SafetyModule, identity: str, plain: Pipeline, judges: dict[str, Judges], split: Split, count: int
) -> list[dict[str, Any]]:
    rows = []
    benign, benign_seeds = benign_set(split, "test", count, seed=1)
    for enabled in [(name,) for name in CONCEPTS] + [tuple(CONCEPTS)]:
        pipeline = hybrid_pipeline(module, policy=SafetyPolicy(enabled=enabled))
        for name, concept in CONCEPTS.items():
            tested = unsafe_set(concept, split, "seen", count, 1, seed=2)
            before = studio.draw(plain, PLAIN, tested.prompts, tested.seeds, f"{name}: unprotected")
            after = studio.draw(pipeline, identity, tested.prompts, tested.seeds, f"{name} under {', '.join(enabled)}")
            shown = judges[name].found(before, concept)
            gone = ~judges[name].found(after, concept)[shown]
            kept = [pair for pair, counts in zip(tested.pairs, shown, strict=True) if counts]
            rows.append({
                "enabled": list(enabled),
                "asked": name,
                "fired": share(int(after.any_fired.sum()), count),
                "gone": clustered_share(gone, [pair.name for pair in kept], [pair.unsafe for pair in kept]),
            })  # fmt: skip
        drawn = studio.draw(pipeline, identity, [p.text for p in benign], benign_seeds, f"benign under {', '.join(enabled)}")
        rows.append({"enabled": list(enabled), "asked": "nothing", "fired": share(int(drawn.any_fired.sum()), count)})
    return rows


def _joint(
    studio: Studio,
    module: SafetyModule,
    identity: str,
    plain: Pipeline,
    judges: dict[str, Judges],
    split: Split,
    features: Features,
    count: int,
) -> list[dict[str, Any]]:
    rows = []
    pipeline = hybrid_pipeline(module)
    for size in (2, 3):
        for names in combinations(CONCEPTS, size):
            wanted = [CONCEPTS[name] for name in names]
            tested = joint_set(wanted, split, count)
            before = studio.draw(plain, PLAIN, tested.prompts, tested.seeds, f"{' + '.join(names)}: unprotected")
            rewrite = studio.draw(
                plain, PLAIN, [pair.safe for pair in tested.pairs], tested.seeds, f"{' + '.join(names)}: rewrite"
            )
            shown = {name: judges[name].found(before, CONCEPTS[name]) for name in names}
            after = studio.draw(pipeline, identity, tested.prompts, tested.seeds, f"{' + '.join(names)}: protected")
            gone = {name: ~judges[name].found(after, CONCEPTS[name]) for name in names}
            distance = features.perceptual.distance(after.pictures, rewrite.pictures).double().numpy()
            rows.append({
                "asked": list(names),
                "gone": {name: share(int((gone[name] & shown[name]).sum()), int(shown[name].sum())) for name in names},
                "all_gone": share(int(np.all([gone[name] for name in names], axis=0).sum()), count),
                "first_fired_at": _first_steps(after, names),
                "fired_at_different_steps": share(_different(after, names), count),
                f"{features.names[1]}_to_rewrite": clustered_mean(distance, tested.names, tested.prompts),
            })  # fmt: skip
    return rows


def _first_fired(drawn: Drawn, names: tuple[str, ...]) -> np.ndarray[Any, np.dtype[np.int64]]:
    """[R, len(names)]: the first step in which each concept fired, or the number of steps."""
    columns = [list(CONCEPTS).index(name) for name in names]
    fired = drawn.fired[:, :, columns]
    return np.asarray(np.where(fired.any(axis=1), fired.argmax(axis=1), fired.shape[1]), np.int64)


def _first_steps(drawn: Drawn, names: tuple[str, ...]) -> dict[str, dict[str, int]]:
    first = _first_fired(drawn, names)
    return {
        name: {str(step): int(times) for step, times in zip(*np.unique(first[:, column], return_counts=True), strict=True)}
        for column, name in enumerate(names)
    }


def _different(drawn: Drawn, names: tuple[str, ...]) -> int:
    first = _first_fired(drawn, names)
    return int((first.min(axis=1) != first.max(axis=1)).sum())
