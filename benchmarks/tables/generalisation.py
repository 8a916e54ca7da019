"""Does adversarial training help against attacks that it has not seen? One family of attacks left out at a time."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from diffusers import StableDiffusionPipeline

from benchmarks.drawing import PLAIN, Studio
from benchmarks.hybrid import hybrid_pipeline
from benchmarks.tables.attacks import drawing, targets_of
from benchmarks.tables.forgetting import PARTS, Judges, plain_of
from benchmarks.tables.splits import CONCEPT, PAIRS, STEPS, train_briefly
from saferedir_torch.attacks.hardening import HardenedPrompts
from saferedir_torch.attacks.suite import attack, attempts
from saferedir_torch.attacks.text_families import FAMILIES
from saferedir_torch.evaluation.intervals import share
from saferedir_torch.prompt_source import PromptSource
from saferedir_torch.train import RUNS_FILE
from saferedir_torch.training_data import load_runs
from saferedir_torch.world.prompts import CONCEPTS, benign_set
from saferedir_torch.world.source import WorldPrompts
from saferedir_torch.world.split import Split

TEST_SEED, FIRST_SEED, SEEDS_APART = 19, 900_000, 10_000
NONE, ALL = "none", "all families"


@dataclass(frozen=True)
class Size:
    """Prompts of each part, seeds a prompt, pictures that must count, benign pictures, rewrites; and of the training."""

    prompts: int = 40
    seeds: int = 8
    at_least: int = 60
    benign: int = 200
    rewrites: int = 1000
    steps: int = STEPS
    pairs: int = PAIRS


#: Of the evaluation in a few minutes.
QUICK = Size(prompts=1, seeds=1, at_least=1, benign=2, rewrites=12, steps=2, pairs=60)


def trainings() -> dict[str, list[str]]:
    """What each module is trained against: nothing, everything, and everything but one family."""
    without = {f"without {family}": [other for other in FAMILIES if other != family] for family in FAMILIES}
    return {NONE: [], ALL: list(FAMILIES), **without}


def generalisation(
    studio: Studio, pipeline: StableDiffusionPipeline, split: Split, runs: Path, folder: Path, size: Size
) -> dict[str, Any]:
    """ASR of each family under modules trained with it, without it, and without any; and what fires on benign prompts."""
    concept, bank = CONCEPTS[CONCEPT], load_runs(runs / RUNS_FILE).of([CONCEPT])
    targets = [target for part in PARTS for target in targets_of(concept, split, part, size.prompts)]
    benign, benign_seeds = benign_set(split, "test", size.benign, seed=TEST_SEED)
    figures: dict[str, Any] = {"concept": CONCEPT, "steps": size.steps, "families": {}, "benign_fired": {}}
    for title, families in trainings().items():
        source: PromptSource = WorldPrompts([CONCEPT], split)
        if families:
            source = HardenedPrompts(source, families)
        place = folder / title.replace(" ", "_")
        module = train_briefly(pipeline, source, bank, place, steps=size.steps, pairs=size.pairs)
        drawer, identity = hybrid_pipeline(module), module.sha256()
        plain = plain_of(drawer)
        judges = Judges.calibrated(studio, plain, concept, split, size.rewrites)
        asked = studio.draw(drawer, identity, [prompt.text for prompt in benign], benign_seeds, f"{title}: benign")
        figures["benign_fired"][title] = share(int(np.count_nonzero(asked.any_fired)), size.benign)
        for number, family in enumerate(FAMILIES):
            if title not in (NONE, ALL, f"without {family}"):
                continue
            first = split.seeds["test"][0] + FIRST_SEED + number * SEEDS_APART
            outcome = attack(
                attempts(targets, family, first, seeds_a_prompt=size.seeds, seed=TEST_SEED),
                drawing(studio, plain, PLAIN, f"{title}, {family}"),
                drawing(studio, drawer, identity, f"{title}, {family}"),
                partial(judges.found_in, concept=concept),
                at_least=size.at_least,
            )
            trained = {NONE: "no family", ALL: "all families"}.get(title, "all others")
            figures["families"].setdefault(family, {})[trained] = outcome.figures()
    return figures
