"""Prompts that ask for a concept, with their safe rewrites, and prompts that do not; for training and for testing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from saferedir_torch.world.captions import Draft, Names, all_names, deny, draft, spelt_right
from saferedir_torch.world.inventions import invent, telling_words
from saferedir_torch.world.scenes import Scene
from saferedir_torch.world.split import Split
from saferedir_torch.world.vocabulary import load_vocabulary

#: Share of training pairs of one concept that ask for another one as well, for each other.
JOINT_SHARE = 0.25
#: Share of prompts asking for a category that ask for two of its members.
TWO_MEMBERS_SHARE = 0.2
#: Share of training pairs whose concept is asked for by a name that nobody has taught.
INVENTED_SHARE = 0.25
#: Share of training pairs whose companion is.
INVENTED_COMPANION_SHARE = 0.25
#: Share of training pairs of a category that ask for it by its own word.
CATEGORY_WORD_SHARE = 0.15
#: Benign prompts are drawn in blocks of this many before their seeds are.
BENIGN_BLOCK = 3000
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

#: A concept that the shipped module does not know, to be added to it.
LATER_CONCEPTS = {"teddy": WorldConcept("teddy", ("teddy",), "", "gift", ("bear", "balloon"))}


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
    #: Concepts that the unsafe prompt asks for, by words that are known to mean them.
    asked: tuple[str, ...]
    #: Concepts that the rewrite replaces.
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
    first: str | None = None,
    avoid: Sequence[WorldConcept] = (),
    misspellings: bool = True,
) -> PromptPair:
    """A random pair that asks for every concept of `wanted`, phrased with `names`; its rewrite replaces `replaced`.

    `first` is the member that the first of `wanted` is asked for by; any of its members where it is left out.

    At most two of `wanted` may be objects and one a style. A single object concept stands half of the time beside one of
    `companions`, a category at times beside another of its members; a style is drawn on one or two companions. Nothing of
    `avoid` is asked for besides.
    """
    vocabulary = load_vocabulary()
    unwanted = {key for concept in avoid for key in concept.shown_by} | {concept.replacement for concept in wanted}
    pool = [key for key in companions if key not in unwanted]
    objects = [concept.members[rng.integers(len(concept.members))] for concept in wanted if concept.members]
    if first in wanted[0].members:
        objects[0] = first
    category = next((concept for concept in wanted if concept.category), None)
    if len(objects) == 1 and category is not None and rng.random() < TWO_MEMBERS_SHARE:
        second = [key for key in category.members if key not in objects]
        objects += [second[rng.integers(len(second))]] if second else []
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


def benign_set(
    split: Split,
    part: Literal["validation", "test"],
    count: int,
    *,
    seed: int = 0,
    concepts: Sequence[WorldConcept] | None = None,
) -> tuple[list[BenignPrompt], list[int]]:
    """`count` prompts, spelt right, with a seed each; half of them for near neighbours of a concept, in any names.

    They ask for nothing of `concepts`, which are those of the shipped module by default. "validation" is for calibrating
    and "test" for testing: other prompts of the same kind, other seeds. A slip can ask for a concept, as "ranibow" does, of
    which the model draws a bow; so there are none.
    """
    rng = np.random.default_rng([seed, 62 if part == "test" else 64])
    absent = list(CONCEPTS.values() if concepts is None else concepts)
    prompts: list[BenignPrompt] = []
    seeds: list[int] = []
    while len(prompts) < count:
        block = [benign_prompt(absent, rng, all_names(), neighbour_share=0.5) for _ in range(BENIGN_BLOCK)]
        numbers = rng.integers(*split.seeds[part], size=BENIGN_BLOCK).tolist()
        for prompt, number in zip(block, numbers, strict=True):
            if spelt_right(prompt.text):
                prompts.append(prompt)
                seeds.append(number)
    return prompts[:count], seeds[:count]


def training_pair(
    concept: WorldConcept, rng: np.random.Generator, split: Split, others: Sequence[WorldConcept] = ()
) -> PromptPair:
    """A pair that training may see: seen names, seen companions, some misspellings.

    Some ask for one or more of `others` as well, of which the rewrite replaces some: whatever has fired by then.
    """
    return _training_pair(concept, rng, split, split.names, others)


def added_pair(
    concept: WorldConcept, rng: np.random.Generator, split: Split, known: Sequence[WorldConcept], *, varied: bool
) -> PromptPair:
    """A training pair for a concept that is added to `known` ones: what shows those is neither replaced nor avoided."""
    invented = _inventions(concept.named_by, rng, split) if varied and rng.random() < INVENTED_SHARE else {}
    wanted = [concept, *(other for other in known if rng.random() < JOINT_SHARE)]
    pair = pair_prompt(wanted, rng, {**split.names, **invented}, split.companions, replaced=[concept], avoid=[concept])
    return replace(pair, asked=tuple(name for name in pair.asked if not (invented and name == concept.name)))


def known_pair(
    concept: WorldConcept, rng: np.random.Generator, split: Split, others: Sequence[WorldConcept], absent: WorldConcept
) -> PromptPair:
    """A training pair that asks for `concept`, and at times for `others`, and never for `absent`: benign, where that one is
    what is looked for."""
    wanted = [concept, *(other for other in others if rng.random() < JOINT_SHARE)]
    return pair_prompt(wanted, rng, split.names, split.companions, avoid=[concept, *others, absent])


def varied_training_pair(
    concept: WorldConcept, rng: np.random.Generator, split: Split, others: Sequence[WorldConcept] = ()
) -> PromptPair:
    """The same, but some ask for the concept, and some for its companion, by names that nobody has taught, and more ask
    for a category by its own word."""
    chance = rng.random()
    if chance < INVENTED_SHARE:
        invented = _inventions(concept.named_by, rng, split)
        pair = _training_pair(concept, rng, split, {**split.names, **invented}, others)
        return replace(pair, asked=tuple(name for name in pair.asked if name != concept.name))
    if chance < INVENTED_SHARE + INVENTED_COMPANION_SHARE:
        return _training_pair(concept, rng, split, {**split.names, **_inventions(split.companions, rng, split)}, others)
    if concept.category and chance < INVENTED_SHARE + INVENTED_COMPANION_SHARE + CATEGORY_WORD_SHARE:
        words = dict.fromkeys(concept.members, split.names[concept.category])
        return _training_pair(concept, rng, split, {**split.names, **words}, others)
    return training_pair(concept, rng, split, others)


def _training_pair(
    concept: WorldConcept, rng: np.random.Generator, split: Split, names: Names, others: Sequence[WorldConcept]
) -> PromptPair:
    wanted = [concept, *(other for other in others if rng.random() < JOINT_SHARE)]
    replaced = [concept, *(other for other in wanted[1:] if rng.random() < 0.5)]
    return pair_prompt(wanted, rng, names, split.companions, replaced=replaced, avoid=[concept, *others])


def _inventions(keys: Iterable[str], rng: np.random.Generator, split: Split) -> dict[str, list[str]]:
    """One invented name for each of `keys`, built like a seen name of another thing of its kind."""
    styles = load_vocabulary().style_keys
    benign = [name for key in split.companions for name in split.names[key]]
    words = telling_words(benign)
    models = {True: [name for key in styles for name in split.names[key]], False: benign}
    invented = {}
    for key in keys:
        built_like = models[key in styles]
        invented[key] = [invent(built_like[rng.integers(len(built_like))], rng, words)]
    return invented


def evaluation_pairs(
    concept: WorldConcept, split: Split, part: Part, count: int, *, seed: int, avoid: Sequence[WorldConcept] = ()
) -> Iterator[PromptPair]:
    """`count` test pairs: held-out companions, the concept's names of `part` in turn, spelt right, nothing of `avoid`."""
    rng = np.random.default_rng([seed, 11])
    table = split.held_out_names if part == "held_out" else split.names
    turns = [(key, name) for key in concept.named_by for name in table[key]]
    for index in range(count):
        key, name = turns[index % len(turns)]
        # A category's word stands for any member; a name for the one that bears it.
        members = (key,) if key in concept.members else concept.members
        member = members[rng.integers(len(members))] if members else key
        names = {**all_names(), **{other: table[other] for other in concept.shown_by}, member: [name]}
        if concept.category:
            names[concept.category] = [name]
        pair = pair_prompt([concept], rng, names, split.held_out_companions, first=member, avoid=avoid, misspellings=False)
        yield replace(pair, name=name)


def _look(rng: np.random.Generator, styles: list[str], backgrounds: list[str]) -> tuple[str, str]:
    return styles[rng.integers(len(styles))], backgrounds[rng.integers(len(backgrounds))]


def _without_contradiction(prompt: Draft, concepts: Sequence[WorldConcept]) -> Draft:
    """A pair must not forbid what its rewrite asks for."""
    contradicts = prompt.absent in {concept.replacement for concept in concepts}
    return replace(prompt, absent=None, negation="") if contradicts else prompt
