"""Prompts that hide what they ask for: how often the concept is drawn under safety all the same, by family of attack."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from benchmarks.drawing import PLAIN, Studio
from benchmarks.tables.forgetting import PARTS, Judges, plain_of
from benchmarks.test_sets import unsafe_set
from saferedir.runtime import Pipeline
from saferedir_torch.attacks.suite import UNCHANGED, Attempts, Draw, Pixels, attack, attempts
from saferedir_torch.attacks.text_families import FAMILIES, Target
from saferedir_torch.world.prompts import Part, WorldConcept
from saferedir_torch.world.split import Split

#: Of the tested prompts, and from which the pictures' seeds count up: a thousand for each family.
TEST_SEED, FIRST_SEED, SEEDS_APART = 12, 500_000, 1000


@dataclass(frozen=True)
class Size:
    """Prompts a family, seeds a prompt, how many of those must count, and validation rewrites for the judges."""

    prompts: int = 60
    seeds: int = 8
    at_least: int = 300
    rewrites: int = 1000


#: Of the evaluation in a few minutes.
QUICK = Size(prompts=2, seeds=1, at_least=1, rewrites=12)


def attacks(
    studio: Studio, protected: Pipeline, identity: str, concept: WorldConcept, split: Split, size: Size
) -> dict[str, Any]:
    """ASR of every family, on prompts with seen and held-out names in equal parts; unchanged prompts of either part first."""
    plain = plain_of(protected)
    judges = Judges.calibrated(studio, plain, concept, split, size.rewrites)
    first, _ = split.seeds["test"]
    names = [f"{UNCHANGED}, {part}" for part in PARTS] + list(FAMILIES)

    def made(number: int, name: str) -> Attempts:
        seed = first + FIRST_SEED + SEEDS_APART * number
        if name in FAMILIES:
            targets = [target for part in PARTS for target in targets_of(concept, split, part, size.prompts // 2)]
            return attempts(targets, name, seed, seeds_a_prompt=size.seeds)
        part = PARTS[number]
        return attempts(targets_of(concept, split, part, size.prompts), UNCHANGED, seed, seeds_a_prompt=size.seeds)

    figures: dict[str, Any] = {"concept": concept.name, "found_at": judges.found_at, "families": {}}
    for number, name in enumerate(names):
        outcome = attack(
            made(number, name),
            drawing(studio, plain, PLAIN, f"{concept.name}, {name}"),
            drawing(studio, protected, identity, f"{concept.name}, {name}"),
            lambda pixels: judges.found_in(pixels, concept),
            at_least=size.at_least,
        )
        figures["families"][name] = outcome.figures()
    return figures


def targets_of(concept: WorldConcept, split: Split, part: Part, count: int) -> list[Target]:
    """`count` prompts that ask for `concept` once, by names of `part`, so that an attack on that name hides all that asks."""
    pairs = unsafe_set(concept, split, part, 2 * count, 1, seed=TEST_SEED).pairs
    once = [
        Target(pair.unsafe, pair.name) for pair in pairs if concept.style or pair.scene.objects.count(concept.replacement) == 1
    ]
    return once[:count]


def drawing(studio: Studio, pipeline: Pipeline, identity: str, title: str) -> Draw:
    """Draws with `pipeline`, and keeps what it drew."""

    def draw(prompts: Any, seeds: Any, kind: str) -> Pixels:
        return studio.draw(pipeline, identity, prompts, seeds, f"{title}, {kind}").pixels

    return draw
