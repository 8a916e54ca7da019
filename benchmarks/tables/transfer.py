"""The shipped module on models that it was not trained for: unchanged, calibrated anew, and re-fitted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.drawing import Drawn, Studio
from benchmarks.tables.forgetting import PARTS, Judges, companion_kept, has_companion
from benchmarks.test_sets import unsafe_set, validation_rewrites
from saferedir.engines.errors import SafetyMismatchError
from saferedir_torch.evaluation.features import Features
from saferedir_torch.evaluation.intervals import clustered_mean, clustered_share, share
from saferedir_torch.models import load_pipeline
from saferedir_torch.peers.peer import Peer
from saferedir_torch.peers.saferedir import SafeRedir
from saferedir_torch.safety_module import SafetyModule, parameters_sha256
from saferedir_torch.world.judge import Judge
from saferedir_torch.world.prompts import CONCEPTS, Part, WorldConcept, benign_set
from saferedir_torch.world.split import Split

TEST_SEED = 17
#: Steps and guidance scale of a scheduler; others draw as the shipped model does.
DRAWN_WITH = {"LCMScheduler": (4, 1.0)}
USUAL = (25, 5.0)


@dataclass(frozen=True)
class Size:
    """Prompts of each part, seeds a prompt, benign pictures, validation rewrites for the judges, and the concepts."""

    prompts: int = 30
    seeds: int = 5
    benign: int = 300
    rewrites: int = 300
    concepts: tuple[str, ...] = tuple(CONCEPTS)


#: Of the evaluation in a few minutes.
QUICK = Size(prompts=2, seeds=1, benign=2, rewrites=6, concepts=("church",))


@dataclass(frozen=True)
class Subject:
    """A model by the name that the table gives it, a module that was calibrated or re-fitted for it, and a judge of its kind of
    pictures."""

    title: str
    model: Path
    refitted: SafetyModule | None = None
    judge: Judge | None = None


def transfer(
    studio: Studio, subjects: Sequence[Subject], module: SafetyModule, split: Split, features: Features, size: Size
) -> dict[str, Any]:
    """An entry a model and module: why it is refused, or its minutes of re-fitting (None where it was not trained anew), how
    many benign pictures are as without safety, and for each concept, held-out names apart: FSR (None where the model does not
    draw it), companion, also where the rewrite is drawn, distance to that."""
    entries = []
    for subject in subjects:
        pipeline = load_pipeline(subject.model)
        steps, guidance = DRAWN_WITH.get(type(pipeline.scheduler).__name__, USUAL)
        plain = Peer(pipeline, steps=steps, guidance_scale=guidance)
        tries = {"unchanged": module}
        if subject.refitted is not None:
            trained = subject.refitted.config.provenance != module.config.provenance
            tries["re-fitted" if trained else "recalibrated"] = subject.refitted
        for kind, tried in tries.items():
            judged_by = "one taught its pictures" if subject.judge else "the shipped one"
            entry: dict[str, Any] = {"model": subject.title, "module": kind, "steps": steps, "judge": judged_by}
            try:
                safe = SafeRedir(pipeline, tried, steps=steps, guidance_scale=guidance)
            except SafetyMismatchError as error:
                entries.append({**entry, "refused": str(error)})
                continue
            bench = _Bench(studio, plain, safe, subject, split, size)
            entry["minutes"] = tried.config.provenance["minutes"] if kind == "re-fitted" else None
            entry["benign_unchanged"] = bench.benign()
            entry["concepts"] = {name: bench.figures(CONCEPTS[name], features) for name in size.concepts}
            entries.append(entry)
    return {"measures": features.names, "safety": module.sha256(), "entries": entries}


class _Bench:
    """One model and module."""

    def __init__(self, studio: Studio, plain: Peer, safe: SafeRedir, subject: Subject, split: Split, size: Size) -> None:
        self.studio, self.plain, self.safe, self.split, self.size = studio, plain, safe, split, size
        self.title, self.judge = subject.title, subject.judge
        self.identity = f"{parameters_sha256(plain.unet)} {parameters_sha256(plain.pipeline.vae)} {plain.steps}"

    def benign(self) -> dict[str, Any]:
        """Share of benign pictures that are the same to the last bit as without safety."""
        asked, seeds = benign_set(self.split, "test", self.size.benign, seed=TEST_SEED)
        prompts = [prompt.text for prompt in asked]
        before = self._draw(self.plain, prompts, seeds, "benign, unprotected")
        after = self._draw(self.safe, prompts, seeds, "benign, protected")
        return share(int((before.pixels == after.pixels).all(axis=(1, 2, 3)).sum()), len(seeds))

    def figures(self, concept: WorldConcept, features: Features) -> dict[str, Any]:
        """Of seen and held-out names."""
        prompts, seeds = validation_rewrites(concept, self.split, self.size.rewrites)
        rewrites = self._draw(self.plain, prompts, seeds, f"{concept.name}: validation rewrites")
        judges = Judges.from_rewrites(rewrites, concept, self.judge)
        return {part: self._part(concept, part, judges, features) for part in PARTS}

    def _part(self, concept: WorldConcept, part: Part, judges: Judges, features: Features) -> dict[str, Any]:
        tested = unsafe_set(concept, self.split, part, self.size.prompts, self.size.seeds, seed=TEST_SEED)
        title = f"{concept.name}, {part}"
        before = self._draw(self.plain, tested.prompts, tested.seeds, f"{title}: unprotected")
        after = self._draw(self.safe, tested.prompts, tested.seeds, f"{title}: protected")
        rewrite = self._draw(self.plain, [pair.safe for pair in tested.pairs], tested.seeds, f"{title}: rewrite")
        shown = judges.found(before, concept)
        gone = ~judges.found(after, concept)[shown]
        names, prompts = np.array(tested.names), np.array(tested.prompts)
        companions = [row for row, pair in enumerate(tested.pairs) if has_companion(pair)]
        kept = {}
        for name, drawn in (("companion", after), ("companion_rewrite", rewrite)):
            opinion = judges.judges["judge"].judge(drawn.pictures)
            kept[name] = share(sum(companion_kept(opinion, row, tested.pairs[row]) for row in companions), len(companions))
        distance = features.perceptual.distance(after.pictures, rewrite.pictures).double().numpy()
        return {
            "shown": share(int(shown.sum()), len(shown)),
            "fsr": clustered_share(gone, names[shown].tolist(), prompts[shown].tolist()) if shown.any() else None,
            **kept,
            features.names[1]: clustered_mean(distance, tested.names, tested.prompts),
        }

    def _draw(self, peer: Peer, prompts: list[str], seeds: list[int], title: str) -> Drawn:
        module = self.safe.controller.module
        key = f"{self.identity} {module.sha256() if isinstance(peer, SafeRedir) else 'plain'}"
        return self.studio.draw(peer, key, prompts, seeds, f"{self.title}, {title}")
