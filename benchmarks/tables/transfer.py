"""The shipped module, unchanged, on models that it was not trained for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.drawing import Drawn, Studio
from benchmarks.tables.forgetting import PARTS, Judges, companion_kept, has_companion
from benchmarks.test_sets import unsafe_set, validation_rewrites
from saferedir_torch.evaluation.features import Features
from saferedir_torch.evaluation.intervals import clustered_mean, clustered_share, share
from saferedir_torch.models import load_pipeline
from saferedir_torch.peers.peer import Peer
from saferedir_torch.peers.saferedir import SafeRedir
from saferedir_torch.safety_module import SafetyModule, parameters_sha256
from saferedir_torch.world.prompts import CONCEPTS, WorldConcept
from saferedir_torch.world.split import Split

TEST_SEED = 17
#: Steps and guidance scale of a scheduler; others draw as the shipped model does.
DRAWN_WITH = {"LCMScheduler": (4, 1.0)}
USUAL = (25, 5.0)


@dataclass(frozen=True)
class Size:
    """Prompts of each part, seeds a prompt, and validation rewrites for the judges."""

    prompts: int = 30
    seeds: int = 5
    rewrites: int = 300


#: Of the evaluation in a few minutes.
QUICK = Size(prompts=2, seeds=1, rewrites=12)


def transfer(
    studio: Studio, models: Mapping[str, Path], module: SafetyModule, split: Split, features: Features, size: Size
) -> dict[str, Any]:
    """A row a model and concept, held-out names apart: FSR, companion, distance to what the model draws of the rewrite."""
    rows = []
    for title, folder in models.items():
        pipeline = load_pipeline(folder)
        steps, guidance = DRAWN_WITH.get(type(pipeline.scheduler).__name__, USUAL)
        plain = Peer(pipeline, steps=steps, guidance_scale=guidance)
        safe = SafeRedir(pipeline, module, steps=steps, guidance_scale=guidance)
        for concept in CONCEPTS.values():
            bench = _Bench(studio, plain, safe, title, concept, split, size)
            rows.append({"model": title, "concept": concept.name, "steps": steps, **bench.figures(split, features, size)})
    return {"measures": features.names, "rows": rows}


class _Bench:
    """One model and concept."""

    def __init__(
        self, studio: Studio, plain: Peer, safe: SafeRedir, title: str, concept: WorldConcept, split: Split, size: Size
    ) -> None:
        self.studio, self.plain, self.safe, self.title, self.concept = studio, plain, safe, title, concept
        self.identity = f"{parameters_sha256(plain.unet)} {plain.steps}"
        prompts, seeds = validation_rewrites(concept, split, size.rewrites)
        self.judges = Judges.from_rewrites(self._draw(plain, prompts, seeds, "validation rewrites"), concept)

    def figures(self, split: Split, features: Features, size: Size) -> dict[str, Any]:
        return {part: self._part(split, features, size, index) for index, part in enumerate(PARTS)}

    def _part(self, split: Split, features: Features, size: Size, index: int) -> dict[str, Any]:
        part = PARTS[index]
        tested = unsafe_set(self.concept, split, part, size.prompts, size.seeds, seed=TEST_SEED)
        before = self._draw(self.plain, tested.prompts, tested.seeds, f"{part}: unprotected")
        after = self._draw(self.safe, tested.prompts, tested.seeds, f"{part}: protected")
        rewrite = self._draw(self.plain, [pair.safe for pair in tested.pairs], tested.seeds, f"{part}: rewrite")
        shown = self.judges.found(before, self.concept)
        gone = ~self.judges.found(after, self.concept)[shown]
        names, prompts = np.array(tested.names), np.array(tested.prompts)
        opinion = self.judges.judges["judge"].judge(after.pictures)
        companions = [row for row, pair in enumerate(tested.pairs) if has_companion(pair)]
        distance = features.perceptual.distance(after.pictures, rewrite.pictures).double().numpy()
        return {
            "shown": share(int(shown.sum()), len(shown)),
            "fsr": clustered_share(gone, names[shown].tolist(), prompts[shown].tolist()),
            "companion": share(sum(companion_kept(opinion, row, tested.pairs[row]) for row in companions), len(companions)),
            features.names[1]: clustered_mean(distance, tested.names, tested.prompts),
        }

    def _draw(self, peer: Peer, prompts: list[str], seeds: list[int], title: str) -> Drawn:
        module = self.safe.controller.module
        key = f"{self.identity} {parameters_sha256(module) if isinstance(peer, SafeRedir) else 'plain'}"
        return self.studio.draw(peer, key, prompts, seeds, f"{self.title}, {self.concept.name}: {title}")
