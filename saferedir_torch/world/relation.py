"""A concept that lives in no single word: a weapon beside an animal. Either alone is harmless.

The rewrite has a balloon in the weapon's place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from saferedir_torch.prompt_source import TrainingPair
from saferedir_torch.world.captions import Draft, Names, draft, telling
from saferedir_torch.world.prompts import Part
from saferedir_torch.world.scenes import Scene
from saferedir_torch.world.split import Split
from saferedir_torch.world.vocabulary import load_vocabulary

ARMED_ANIMAL = "armed_animal"
REPLACEMENT = "balloon"
#: What a benign prompt shows, and the share of each kind in training.
Kind = Literal["weapon", "animal", "neither"]
KINDS: dict[Kind, float] = {"weapon": 0.35, "animal": 0.35, "neither": 0.3}
#: Share of benign prompts that show something else beside.
BESIDE_SHARE = 0.7


@dataclass(frozen=True)
class RelationPair:
    """A prompt that asks for both, and the same with the weapon replaced; the keys of what the prompt shows."""

    unsafe: str
    safe: str
    weapon: str
    animal: str
    #: What the prompt calls the weapon.
    name: str


class RelationPrompts:
    """Training prompts of the relation: seen names of weapons, animals that are no held-out companions."""

    def __init__(self, split: Split) -> None:
        self.split = split
        self.replacements = {ARMED_ANIMAL: REPLACEMENT}
        self.keeps_subject: frozenset[str] = frozenset()
        self.telling = telling()
        self.seeds = split.seeds["train"]

    def pair(self, concept: str, rng: np.random.Generator) -> TrainingPair:
        pair = relation_pair(rng, self.split.names, animals_of(self.split.companions))
        return TrainingPair(pair.unsafe, pair.safe, (concept,), (concept,))

    def varied_pair(self, concept: str, rng: np.random.Generator) -> TrainingPair:
        return self.pair(concept, rng)

    def benign(self, rng: np.random.Generator) -> str:
        kind = list(KINDS)[int(rng.choice(len(KINDS), p=list(KINDS.values())))]
        text, _ = harmless(kind, rng, self.split.names, self.split.companions)
        return text

    def varied_benign(self, rng: np.random.Generator) -> str:
        return self.benign(rng)


def animals_of(keys: Sequence[str]) -> list[str]:
    """Those of `keys` that are animals."""
    animals = load_vocabulary().members("animal")
    return [key for key in keys if key in animals]


def relation_pair(rng: np.random.Generator, names: Names, animals: Sequence[str]) -> RelationPair:
    """A random pair of a weapon and one of `animals`, either on the left."""
    vocabulary = load_vocabulary()
    weapon, animal = _any(vocabulary.members("weapon"), rng), _any(animals, rng)
    objects = (weapon, animal) if rng.random() < 0.5 else (animal, weapon)
    prompt = _without_negation(draft(_scene(objects, rng), rng, names, misspellings=False))
    place = objects.index(weapon)
    phrases = list(prompt.objects)
    phrases[place] = vocabulary.objects[REPLACEMENT].names[0]
    return RelationPair(prompt.text, replace(prompt, objects=tuple(phrases)).text, weapon, animal, prompt.objects[place])


def relation_tests(
    split: Split, part: Part, count: int, *, seed: int, companions: Sequence[str] | None = None
) -> list[RelationPair]:
    """Pairs for testing: weapons by names of `part`, animals of `companions`, which are the held-out ones by default."""
    rng = np.random.default_rng([seed, 77, part == "held_out"])
    table = split.held_out_names if part == "held_out" else split.names
    weapons = load_vocabulary().members("weapon")
    names = {**split.names, **{key: table[key] for key in weapons}, "weapon": table["weapon"]}
    return [relation_pair(rng, names, animals_of(companions or split.held_out_companions)) for _ in range(count)]


def harmless(kind: Kind, rng: np.random.Generator, names: Names, companions: Sequence[str]) -> tuple[str, tuple[str, ...]]:
    """A prompt for a weapon without an animal, an animal without a weapon, or neither, and the keys of what it shows."""
    vocabulary = load_vocabulary()
    weapons, animals = vocabulary.members("weapon"), animals_of(companions)
    things = [key for key in companions if key not in animals and key != REPLACEMENT]
    first = _any({"weapon": weapons, "animal": animals, "neither": things}[kind], rng)
    beside = {"weapon": things + weapons, "animal": things + animals, "neither": things}[kind]
    objects: tuple[str, ...] = (first,)
    if rng.random() < BESIDE_SHARE:
        objects += (_any([key for key in beside if key != first], rng),)
        objects = objects if rng.random() < 0.5 else objects[::-1]
    return _without_negation(draft(_scene(objects, rng), rng, names, misspellings=False)).text, objects


def _scene(objects: tuple[str, ...], rng: np.random.Generator) -> Scene:
    vocabulary = load_vocabulary()
    return Scene(objects, _any(vocabulary.style_keys, rng), _any(vocabulary.background_keys, rng))


def _without_negation(prompt: Draft) -> Draft:
    """What a prompt denies could be the other half of the relation."""
    return replace(prompt, absent=None, negation="")


def _any(choices: Sequence[str], rng: np.random.Generator) -> str:
    return choices[int(rng.integers(len(choices)))]
