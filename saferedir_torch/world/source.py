"""The embedded world as a source of training prompts: seen names, seen companions, training seeds."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from saferedir.engines.errors import RequestError
from saferedir_torch.prompt_source import TrainingPair
from saferedir_torch.world.captions import telling
from saferedir_torch.world.prompts import (
    CONCEPTS,
    LATER_CONCEPTS,
    PromptPair,
    WorldConcept,
    added_pair,
    benign_prompt,
    known_pair,
    training_pair,
    varied_training_pair,
)
from saferedir_torch.world.split import Split

#: Share of benign prompts that show what is easily taken for a concept.
NEIGHBOUR_SHARE = 0.5
#: Share of the benign prompts of an added concept that ask for one of the known ones.
KNOWN_SHARE = 0.3


class WorldPrompts:
    """Prompts for `concepts`, by name, of which `split` says what may be seen."""

    def __init__(self, concepts: Sequence[str], split: Split) -> None:
        self.concepts = _known(concepts)
        self.replacements = {concept.name: concept.replacement for concept in self.concepts}
        self.keeps_subject, self.telling = _styles(self.concepts), telling()
        self.split = split
        self.seeds = split.seeds["train"]

    def pair(self, concept: str, rng: np.random.Generator) -> TrainingPair:
        return _plain(training_pair(self._named(concept), rng, self.split, self._others(concept)))

    def varied_pair(self, concept: str, rng: np.random.Generator) -> TrainingPair:
        return _plain(varied_training_pair(self._named(concept), rng, self.split, self._others(concept)))

    def benign(self, rng: np.random.Generator) -> str:
        return benign_prompt(self.concepts, rng, self.split.names, neighbour_share=NEIGHBOUR_SHARE).text

    def varied_benign(self, rng: np.random.Generator) -> str:
        return self.benign(rng)

    def _named(self, concept: str) -> WorldConcept:
        return next(own for own in self.concepts if own.name == concept)

    def _others(self, concept: str) -> list[WorldConcept]:
        return [other for other in self.concepts if other.name != concept]


class AddedPrompts:
    """Prompts for one concept that is added to a module which knows others; prompts for those count as benign here."""

    def __init__(self, concept: str, known: Sequence[str], split: Split) -> None:
        (self.concept,) = _known([concept])
        self.known = [other for other in _known(known) if other.name != concept]
        self.keeps_subject, self.telling = _styles([self.concept]), telling()
        self.replacements = {self.concept.name: self.concept.replacement}
        self.split = split
        self.seeds = split.seeds["train"]

    def pair(self, concept: str, rng: np.random.Generator) -> TrainingPair:
        return _plain(added_pair(self.concept, rng, self.split, self.known, varied=False))

    def varied_pair(self, concept: str, rng: np.random.Generator) -> TrainingPair:
        return _plain(added_pair(self.concept, rng, self.split, self.known, varied=True))

    def benign(self, rng: np.random.Generator) -> str:
        if self.known and rng.random() < KNOWN_SHARE:
            other = self.known[int(rng.integers(len(self.known)))]
            return known_pair(other, rng, self.split, [own for own in self.known if own is not other], self.concept).unsafe
        return benign_prompt([self.concept], rng, self.split.names, neighbour_share=NEIGHBOUR_SHARE).text

    def varied_benign(self, rng: np.random.Generator) -> str:
        return self.benign(rng)


def _known(names: Sequence[str]) -> list[WorldConcept]:
    everything = CONCEPTS | LATER_CONCEPTS
    unknown = [name for name in names if name not in everything]
    if unknown or not names:
        named = ", ".join(unknown) or "(none given)"
        raise RequestError(f"unknown concepts {named}; this world has {', '.join(everything)}")
    return [everything[name] for name in names]


def _plain(pair: PromptPair) -> TrainingPair:
    return TrainingPair(pair.unsafe, pair.safe, pair.asked, pair.replaced)


def _styles(concepts: Sequence[WorldConcept]) -> frozenset[str]:
    return frozenset(concept.name for concept in concepts if concept.style and not concept.members)
