"""Prompts that nobody was taught, as users write them and of foreign domains: false fires, and what they cost the picture.

Of those that ask for a concept in strange words: what is missed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.drawing import PLAIN, Drawn, Setting, Studio, plain_of
from benchmarks.prompt_files import read_prompts
from benchmarks.tables.forgetting import Judges
from saferedir.runtime import Pipeline
from saferedir_torch.evaluation.intervals import clustered_share, share
from saferedir_torch.evaluation.measures import FOUND
from saferedir_torch.world.prompts import CONCEPTS
from saferedir_torch.world.split import Split
from saferedir_torch.world.vocabulary import load_vocabulary

Bools = npt.NDArray[np.bool_]
#: Files of prompts without a concept, and one of prompts that have one.
BENIGN, ASKING = ("everyday", "foreign"), "asking"
FIRST_SEED = 77_000


@dataclass(frozen=True)
class Size:
    """Numbers of steps, seeds a prompt, prompts of each kind (all where it is None), and validation rewrites."""

    steps: tuple[int, ...] = (25, 12)
    seeds: int = 1
    most: int | None = None
    rewrites: int = 1000


QUICK = Size(steps=(5, 4), most=1, rewrites=12)


def picture_steps(size: Size) -> float:
    """Guided steps of one picture that are drawn, those of validation rewrites aside."""
    prompts = sum(len(own[: size.most]) for name in (*BENIGN, ASKING) for own in read_prompts(name).values())
    return 2 * prompts * size.seeds * float(sum(size.steps))


def unfamiliar(studio: Studio, protected: Pipeline, identity: str, split: Split, size: Size) -> dict[str, Any]:
    """By file and number of steps: how many pictures without a concept fire, and what is kept in those; by kind too."""
    plain = plain_of(protected)
    judges = {name: Judges.calibrated(studio, plain, concept, split, size.rewrites) for name, concept in CONCEPTS.items()}
    bench = _Bench(studio, protected, plain, identity, judges, split.seeds["test"][0] + FIRST_SEED, size)
    return {
        "files": {name: {str(steps): bench.benign(name, steps) for steps in size.steps} for name in BENIGN},
        ASKING: {str(steps): bench.asking(steps) for steps in size.steps},
    }


@dataclass(frozen=True)
class _Bench:
    studio: Studio
    protected: Pipeline
    plain: Pipeline
    identity: str
    judges: dict[str, Judges]
    first_seed: int
    size: Size

    def benign(self, name: str, steps: int) -> dict[str, Any]:
        kinds, prompts, before, after = self._drawn(name, steps)
        quiet = ~self._shown(before)
        fired = after.any_fired
        rows = np.flatnonzero(quiet & fired)
        key, still = self._kept(before, after)
        had = rows[key[rows] >= 0]
        objects = load_vocabulary().object_keys
        concepts = [concept.name for concept in self.protected.manifest.safety.concepts]
        return {
            "pictures": len(prompts),
            "show_a_concept": share(int((~quiet).sum()), len(prompts)),
            "fired": share(int(fired.sum()), len(prompts)),
            "fired_without_a_concept": _share_of(fired, quiet, kinds, prompts),
            "fired_at_first_step": _share_of(np.asarray(after.fired[:, 0].any(axis=1)), quiet, kinds, prompts),
            # Of those that fire and showed some object: the one that the judge was surest of is still found.
            "kept_where_fired": share(int(still[had].sum()), len(had)),
            "fired_prompts": [
                {
                    "prompt": prompts[row],
                    "concepts": [own for n, own in enumerate(concepts) if after.fired[row, :, n].any()],
                    "first_step": int(after.fired[row].any(axis=1).argmax()),
                    "showed": objects[key[row]] if key[row] >= 0 else None,
                    "kept": bool(still[row]) if key[row] >= 0 else None,
                }
                for row in rows.tolist()
            ],
            "kinds": {
                kind: share(int((fired & own).sum()), int(own.sum()))
                for kind in dict.fromkeys(kinds)
                for own in [quiet & np.array([other == kind for other in kinds])]
            },
        }

    def asking(self, steps: int) -> dict[str, Any]:
        """By kind: pictures that show a concept without safety, that fire, and that show it still."""
        kinds, _, before, after = self._drawn(ASKING, steps)
        shown, still = self._shown_to_judge(before), self._shown_to_judge(after)
        rows = {}
        for kind in dict.fromkeys(kinds):
            own = np.array([other == kind for other in kinds])
            rows[kind] = {
                "shows_a_concept_unprotected": share(int((shown & own).sum()), int(own.sum())),
                "fired": share(int((after.any_fired & own).sum()), int(own.sum())),
                "shows_a_concept_protected": share(int((still & shown & own).sum()), int((shown & own).sum())),
            }
        return rows

    def _drawn(self, name: str, steps: int) -> tuple[list[str], list[str], Drawn, Drawn]:
        every = [(kind, prompt) for kind, own in read_prompts(name).items() for prompt in own[: self.size.most]]
        kinds, prompts = ([pair[side] for pair in every for _ in range(self.size.seeds)] for side in (0, 1))
        seeds = [self.first_seed + 1000 * steps + row for row in range(len(prompts))]
        title, setting = f"{name}, {steps} steps", Setting(steps)
        before = self.studio.draw(self.plain, PLAIN, prompts, seeds, f"{title}: unprotected", setting)
        after = self.studio.draw(self.protected, self.identity, prompts, seeds, f"{title}: protected", setting)
        return kinds, prompts, before, after

    def _shown(self, drawn: Drawn) -> Bools:
        """[R]: either judge finds some concept."""
        found = [
            self.judges[name].found(drawn, concept, judge)
            for name, concept in CONCEPTS.items() for judge in ("judge", "second_judge")
        ]  # fmt: skip
        return np.asarray(np.any(found, axis=0), np.bool_)

    def _shown_to_judge(self, drawn: Drawn) -> Bools:
        found = [self.judges[name].found(drawn, concept) for name, concept in CONCEPTS.items()]
        return np.asarray(np.any(found, axis=0), np.bool_)

    def _kept(self, before: Drawn, after: Drawn) -> tuple[npt.NDArray[np.int64], Bools]:
        """[R]: the object that the judge is surest of without safety, -1 where it finds none; whether it is found with it."""
        judge = self.judges[next(iter(CONCEPTS))].judges["judge"]
        was, now = (judge.judge(drawn.pictures).objects.numpy() for drawn in (before, after))
        surest = was.argmax(axis=1)
        rows = np.arange(len(was))
        return np.where(was[rows, surest] >= FOUND, surest, -1), np.asarray(now[rows, surest] >= FOUND, np.bool_)


def _share_of(outcome: Bools, counted: Bools, names: list[str], prompts: list[str]) -> dict[str, float]:
    rows = np.flatnonzero(counted)
    return clustered_share(outcome[rows], [names[row] for row in rows], [prompts[row] for row in rows])
