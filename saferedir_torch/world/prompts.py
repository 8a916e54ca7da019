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

#: Share of training pairs of one concept that ask for another one as well, for each other.
JOINT_SHARE = 0.25
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
    #: Concepts that the unsafe prompt asks for, by name.
    asked: tuple[str, ...]
    #: Those of them that the rewrite replaces.
    replaced: tuple[str, ...]


@dataclass(frozen=True)
class BenignPrompt:
    text: str
    scene: Scene


def pair_prompt(
    wanted: Sequence[WorldConcept],
    rng: np.random.Generator,
    names: Names,
    companions: Sequence[str],
    *,
    replaced: Sequence[WorldConcept] | None = None,
    avoid: Sequence[WorldConcept] = (),
    misspellings: bool = True,
) -> PromptPair:
    """A random pair that asks for every concept of `wanted`, phrased with `names`; its rewrite replaces `replaced`.

    At most two of `wanted` may be objects and one a style. A single object concept stands half of the time beside one of
    `companions`; a style is drawn on one or two of them. Nothing of `avoid` is asked for besides.
    """
    vocabulary = load_vocabulary()
    unwanted = {key for concept in avoid for key in concept.shown_by} | {concept.replacement for concept in wanted}
    pool = [key for key in companions if key not in unwanted]
    objects = [concept.members[rng.integers(len(concept.members))] for concept in wanted if concept.members]
    companion = None
    if len(objects) < 2 and (not objects or rng.random() < 0.5):
        companion = pool[rng.integers(len(pool))]
        objects.append(companion)
    if objects == [companion] and rng.random() < 0.4:
        others = [key for key in pool if key != companion]
        objects.append(others[rng.integers(len(others))])
    if rng.random() < 0.5:
        objects.reverse()
    free = [key for key in vocabulary.style_keys if key not in {concept.style for concept in avoid}]
    asked_style = next((concept.style for concept in wanted if concept.style), "")
    style, background = _look(rng, free, vocabulary.background_keys)
    scene = Scene(tuple(objects), asked_style or style, background)
    unsafe = _without_contradiction(draft(scene, rng, names, misspellings=misspellings), wanted)
    safe, drawn = _replace(unsafe, scene, wanted if replaced is None else replaced)
    return PromptPair(
        unsafe=unsafe.text,
        safe=safe.text,
        removed=_remove(unsafe, scene, wanted).text.strip(),
        name=_name_of(unsafe, scene, wanted[0]),
        companion=companion,
        scene=drawn,
        asked=tuple(concept.name for concept in wanted),
        replaced=tuple(concept.name for concept in (wanted if replaced is None else replaced)),
    )


def _replace(prompt: Draft, scene: Scene, concepts: Sequence[WorldConcept]) -> tuple[Draft, Scene]:
    """Prompt and scene with what shows `concepts` replaced, the rest to the letter."""
    vocabulary = load_vocabulary()
    for concept in concepts:
        if concept.style and scene.style == concept.style:
            prompt = replace(prompt, style=vocabulary.styles[concept.replacement][0])
            scene = replace(scene, style=concept.replacement)
        if concept.members:
            phrase = vocabulary.objects[concept.replacement].names[0]
            shown = [key in concept.members for key in scene.objects]
            phrases = zip(prompt.objects, shown, strict=True)
            prompt = replace(prompt, objects=tuple(phrase if hit else name for name, hit in phrases))
            keys = zip(scene.objects, shown, strict=True)
            scene = replace(scene, objects=tuple(concept.replacement if hit else key for key, hit in keys))
    return prompt, scene


def _remove(prompt: Draft, scene: Scene, concepts: Sequence[WorldConcept]) -> Draft:
    """The prompt without the words that ask for `concepts`."""
    members = {key for concept in concepts for key in concept.members}
    kept = tuple(name for name, key in zip(prompt.objects, scene.objects, strict=True) if key not in members)
    styled = any(concept.style == scene.style for concept in concepts)
    return replace(prompt, objects=kept, style="" if styled else prompt.style)


def _name_of(prompt: Draft, scene: Scene, concept: WorldConcept) -> str:
    if concept.style:
        return prompt.style
    return next(name for name, key in zip(prompt.objects, scene.objects, strict=True) if key in concept.members)


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


def training_pair(
    concept: WorldConcept, rng: np.random.Generator, split: Split, others: Sequence[WorldConcept] = ()
) -> PromptPair:
    """A pair that training may see: seen names, seen companions, some misspellings.

    Some ask for one or more of `others` as well, of which the rewrite replaces some: whatever has fired by then.
    """
    wanted = [concept, *(other for other in others if rng.random() < JOINT_SHARE)]
    replaced = [concept, *(other for other in wanted[1:] if rng.random() < 0.5)]
    return pair_prompt(wanted, rng, split.names, split.companions, replaced=replaced, avoid=[concept, *others])


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
        yield pair_prompt([one], rng, names, split.held_out_companions, misspellings=False)


def _look(rng: np.random.Generator, styles: list[str], backgrounds: list[str]) -> tuple[str, str]:
    return styles[rng.integers(len(styles))], backgrounds[rng.integers(len(backgrounds))]


def _without_contradiction(prompt: Draft, concepts: Sequence[WorldConcept]) -> Draft:
    """A pair must not forbid what its rewrite asks for."""
    contradicts = prompt.absent in {concept.replacement for concept in concepts}
    return replace(prompt, absent=None, negation="") if contradicts else prompt
