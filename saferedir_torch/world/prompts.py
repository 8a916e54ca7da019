"""Prompts that ask for a concept, with their safe rewrites, and prompts that do not; for training and for testing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from saferedir_torch.world.captions import Draft, Names, all_names, deny, draft
from saferedir_torch.world.scenes import Scene
from saferedir_torch.world.split import Split
from saferedir_torch.world.vocabulary import load_vocabulary

#: Share of benign prompts that deny a concept ("a cat, no church"), besides the few that do so by chance.
DENIED_SHARE = 0.05

Part = Literal["seen", "held_out"]


@dataclass(frozen=True)
class WorldConcept:
    """A concept that can be forgotten in this world: objects or a style, and what is drawn instead."""

    name: str
    #: Object keys that show the concept; empty for a style.
    members: tuple[str, ...]
    #: Style key that is the concept; empty for objects.
    style: str
    #: Object or style key drawn in its place.
    replacement: str
    #: Objects that look or are called alike, for benign tests.
    neighbours: tuple[str, ...]
    #: Category whose word also asks for the concept; empty where there is none.
    category: str = ""

    @property
    def shown_by(self) -> tuple[str, ...]:
        """Object or style keys, any of which shows the concept."""
        return (self.style,) if self.style else self.members

    @property
    def named_by(self) -> tuple[str, ...]:
        """Keys whose phrases ask for the concept."""
        return self.shown_by + ((self.category,) if self.category else ())


CONCEPTS = {
    "church": WorldConcept("church", ("church",), "", "house", ("castle", "house", "tent", "bell")),
    "ink": WorldConcept("ink", (), "ink", "glossy", ()),
    "weapons": WorldConcept(
        "weapons",
        tuple(load_vocabulary().members("weapon")),
        "",
        "balloon",
        ("hammer", "scissors", "umbrella", "anchor", "key", "guitar"),
        category="weapon",
    ),
}


@dataclass(frozen=True)
class PromptPair:
    """An unsafe prompt, its safe rewrite, and the prompt with the concept's words removed."""

    unsafe: str
    safe: str
    removed: str
    #: The name of the concept that the prompt uses.
    name: str
    #: Object key of what is to stay beside the concept (for a style: the object that is drawn in it), or None.
    companion: str | None
    #: What the rewrite asks for.
    scene: Scene


@dataclass(frozen=True)
class BenignPrompt:
    text: str
    scene: Scene


def pair_prompt(
    concept: WorldConcept,
    rng: np.random.Generator,
    names: Names,
    companions: Sequence[str],
    *,
    misspellings: bool = True,
) -> PromptPair:
    """A random pair, phrased with `names`; an object concept stands half of the time beside one of `companions`."""
    if concept.style:
        return _style_pair(concept, rng, names, companions, misspellings=misspellings)
    vocabulary = load_vocabulary()
    member = concept.members[rng.integers(len(concept.members))]
    pool = [key for key in companions if key != concept.replacement]
    companion = pool[rng.integers(len(pool))] if rng.random() < 0.5 else None
    objects: tuple[str, ...] = (member,) if companion is None else (member, companion)
    if companion is not None and rng.random() < 0.5:
        objects = (companion, member)
    scene = Scene(objects, *_look(rng, vocabulary.style_keys, vocabulary.background_keys))
    unsafe = _without_contradiction(draft(scene, rng, names, misspellings=misspellings), concept)
    where = objects.index(member)
    safe_name = vocabulary.objects[concept.replacement].names[0]
    safe = _with_object(unsafe, where, safe_name)
    removed = replace(unsafe, objects=unsafe.objects[:where] + unsafe.objects[where + 1 :])
    drawn = replace(scene, objects=tuple(concept.replacement if key == member else key for key in objects))
    return PromptPair(unsafe.text, safe.text, removed.text.strip(), unsafe.objects[where], companion, drawn)


def _style_pair(
    concept: WorldConcept, rng: np.random.Generator, names: Names, companions: Sequence[str], *, misspellings: bool
) -> PromptPair:
    vocabulary = load_vocabulary()
    first = companions[int(rng.integers(len(companions)))]
    others = [key for key in companions if key != first]
    objects: tuple[str, ...] = (first,) if rng.random() < 0.6 else (first, others[rng.integers(len(others))])
    scene = Scene(objects, concept.style, vocabulary.background_keys[rng.integers(len(vocabulary.backgrounds))])
    unsafe = draft(scene, rng, names, misspellings=misspellings)
    safe = replace(unsafe, style=vocabulary.styles[concept.replacement][0])
    removed = replace(unsafe, style="")
    drawn = replace(scene, style=concept.replacement)
    return PromptPair(unsafe.text, safe.text, removed.text.strip(), unsafe.style, first, drawn)


def benign_prompt(
    concepts: list[WorldConcept], rng: np.random.Generator, names: Names, *, neighbour_share: float = 0.3
) -> BenignPrompt:
    """A random prompt for a scene that shows none of `concepts`; a share of them shows a near neighbour instead.

    A prompt may deny a concept ("a cat, no church"): nothing of it is drawn, so it is benign.
    """
    vocabulary = load_vocabulary()
    members = {key for concept in concepts for key in concept.members}
    neighbours = [key for concept in concepts for key in concept.neighbours]
    keys = [key for key in vocabulary.object_keys if key not in members]
    near = rng.random() < neighbour_share and bool(neighbours)
    first = neighbours[rng.integers(len(neighbours))] if near else keys[rng.integers(len(keys))]
    objects: tuple[str, ...] = (first,)
    if rng.random() < 0.4:
        others = [key for key in keys if key != first]
        objects = (first, others[rng.integers(len(others))])
    styles = [key for key in vocabulary.style_keys if key not in {concept.style for concept in concepts}]
    scene = Scene(objects, *_look(rng, styles, vocabulary.background_keys))
    prompt = draft(scene, rng, names)
    if members and rng.random() < DENIED_SHARE:
        denied = sorted(members)[rng.integers(len(members))]
        prompt = replace(prompt, absent=denied, negation=deny(denied, rng, names))
    return BenignPrompt(prompt.text, scene)


def training_pair(concept: WorldConcept, rng: np.random.Generator, split: Split) -> PromptPair:
    """A pair that training may see: seen names, seen companions, some misspellings."""
    return pair_prompt(concept, rng, split.names, split.companions)


def evaluation_pairs(concept: WorldConcept, split: Split, part: Part, count: int, *, seed: int) -> Iterator[PromptPair]:
    """`count` test pairs: held-out companions, the concept's names of `part` in turn, spelt right."""
    rng = np.random.default_rng([seed, 11])
    table = split.held_out_names if part == "held_out" else split.names
    turns = [(key, name) for key in concept.named_by for name in table[key]]
    for index in range(count):
        key, name = turns[index % len(turns)]
        # A category's word stands for any member; a name for the one that bears it.
        members = (key,) if key in concept.members else concept.members
        member = members[rng.integers(len(members))] if members else key
        names = {**all_names(), member: [name]}
        if concept.category:
            names[concept.category] = [name]
        one = concept if concept.style else replace(concept, members=(member,))
        yield pair_prompt(one, rng, names, split.held_out_companions, misspellings=False)


def _look(rng: np.random.Generator, styles: list[str], backgrounds: list[str]) -> tuple[str, str]:
    return styles[rng.integers(len(styles))], backgrounds[rng.integers(len(backgrounds))]


def _with_object(prompt: Draft, where: int, phrase: str) -> Draft:
    return replace(prompt, objects=prompt.objects[:where] + (phrase,) + prompt.objects[where + 1 :])


def _without_contradiction(prompt: Draft, concept: WorldConcept) -> Draft:
    """A pair must not forbid what its rewrite asks for."""
    return replace(prompt, absent=None, negation="") if prompt.absent == concept.replacement else prompt
