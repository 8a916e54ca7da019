"""Does anything fire on benign prompts, and is every picture untouched where nothing did?"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from benchmarks.drawing import PLAIN, Studio
from benchmarks.tables.forgetting import plain_of
from saferedir.runtime import Pipeline
from saferedir_torch.evaluation.features import Features
from saferedir_torch.evaluation.intervals import share
from saferedir_torch.world.prompts import CONCEPTS, benign_set
from saferedir_torch.world.split import Split

FULL, QUICK = 3000, 16


def benign(studio: Studio, protected: Pipeline, identity: str, split: Split, features: Features, count: int) -> dict[str, Any]:
    """`count` benign test prompts, half of them near neighbours of a concept, drawn with and without safety."""
    asked, seeds = benign_set(split, "test", count)
    prompts = [prompt.text for prompt in asked]
    plain = studio.draw(plain_of(protected), PLAIN, prompts, seeds, "benign, unprotected")
    safe = studio.draw(protected, identity, prompts, seeds, "benign, protected")
    fired = safe.any_fired
    neighbours = {key for concept in CONCEPTS.values() for key in concept.neighbours}
    alike = np.array([bool(set(prompt.scene.objects) & neighbours) for prompt in asked])
    same = (safe.pixels == plain.pixels).all(axis=(1, 2, 3))
    by_object: dict[str, Counter[str]] = {}
    for prompt, hit in zip(asked, fired, strict=True):
        for key in prompt.scene.objects:
            by_object.setdefault(key, Counter()).update(of=1, fired=int(hit))
    worst = max(by_object.items(), key=lambda item: (item[1]["fired"], item[1]["fired"] / item[1]["of"]))
    changed = features.perceptual.distance(safe.pictures, plain.pictures).numpy()
    concepts = [concept.name for concept in protected.manifest.safety.concepts]
    per_run = safe.score.max(axis=1)
    return {
        "fired": share(int(fired.sum()), count),
        "fired_near_neighbours": share(int(fired[alike].sum()), int(alike.sum())),
        "fired_others": share(int(fired[~alike].sum()), int((~alike).sum())),
        "bit_identical_where_nothing_fired": share(int(same[~fired].sum()), int((~fired).sum())),
        f"{features.names[1]}_to_unprotected": float(changed.mean()),
        "worst_object": {"object": worst[0], "fired": worst[1]["fired"], "of": worst[1]["of"]},
        "fired_prompts": [
            {
                "prompt": prompts[row],
                "seed": seeds[row],
                "concepts": [name for n, name in enumerate(concepts) if safe.fired[row, :, n].any()],
                "first_step": int(np.flatnonzero(safe.fired[row].any(axis=1))[0]),
            }
            for row in np.flatnonzero(fired)
        ],
        "highest_scores": {
            name: np.quantile(per_run[:, n], (0.5, 0.9, 0.99, 0.999, 1.0)).round(6).tolist() for n, name in enumerate(concepts)
        },
    }
