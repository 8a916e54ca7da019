"""Scene to caption: names, phrasings, filler words, misspellings, negations, long prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from saferedir_torch.everyday import EverydayWords
from saferedir_torch.world.inventions import telling_words
from saferedir_torch.world.scenes import Scene
from saferedir_torch.world.vocabulary import load_vocabulary

#: Style drawn when the prompt names none, so that a style is never drawn unasked.
DEFAULT_STYLE = "glossy"

MISSPELLING_SHARE = 0.05
NEGATION_SHARE = 0.05
LONG_SHARE = 0.08
FILLER_SHARE = 0.2
CATEGORY_SHARE = 0.06
NO_BACKGROUND_SHARE = 0.3
PREFIX_SHARE = 0.35  # long openings included
NO_STYLE_SHARE = 0.5  # of the scenes in the default style
#: Share of captions that hold everyday words, and that hold nothing else.
EVERYDAY_SHARE, ONLY_WORDS_SHARE = 0.35, 0.12

PREFIXES = (
    "a picture of ",
    "an image of ",
    "a drawing of ",
    "an emoji of ",
    "please draw ",
    "show me ",
    "i want ",
    "here is ",
)
BACKGROUND_FORMS = ("on a {} background", "on {}", "with a {} backdrop")
JOINS = (" next to ", " and ", " beside ", " with ", " together with ", " to the left of ")
FILLERS = (
    "lovely",
    "nice",
    "simple",
    "very detailed",
    "beautiful",
    "high quality",
    "cute",
    "clean",
    "centered",
    "best quality",
)
LONG_OPENINGS = (
    "we walked for a long time on a quiet afternoon and talked about many things, and then somebody asked for a picture, so",
    "this is for the cover of a small book that my sister wrote last winter when it rained all week, please make",
    "for the poster of the summer party at our school, where everybody brings something to eat and music is played, draw",
    "imagine that you are a patient artist with plenty of time, good paper and a steady hand, and that you now make",
    "my teacher said that every good page starts with one clear thing in the middle and nothing else around it, for example",
)
NEGATIONS = (", no {}", " without {}", ", but not {}", " and no {}")


#: Object, style or category key -> the phrases that may be used for it.
Names = Mapping[str, Sequence[str]]


@dataclass(frozen=True)
class Draft:
    """A prompt in parts, so that a safe rewrite can change one part and leave the rest to the letter."""

    objects: tuple[str, ...]
    join: str
    absent: str | None
    negation: str
    style: str
    background: str
    background_first: bool
    filler: str
    filler_first: bool
    opening: str

    @property
    def text(self) -> str:
        """The prompt."""
        tails = [self.background, self.style] if self.background_first else [self.style, self.background]
        text = " ".join([self.join.join(self.objects) + self.negation, *(tail for tail in tails if tail)])
        if self.filler:
            text = f"{self.filler}, {text}" if self.filler_first else f"{text}, {self.filler}"
        return self.opening + text


@cache
def all_names() -> Names:
    """Every phrase of the vocabulary."""
    vocabulary = load_vocabulary()
    return {item.key: item.names for item in vocabulary.objects.values()} | vocabulary.styles | vocabulary.categories


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """A prompt that asks for `scene`, lower case, phrased at random with any name."""
    return draft(scene, rng, all_names()).text


@cache
def telling() -> frozenset[str]:
    """Words that a name of this world holds."""
    phrases = (name for names in all_names().values() for name in names)
    return frozenset({*telling_words(phrases), *load_vocabulary().background_keys})


@cache
def everyday_words() -> EverydayWords:
    """Those that ask for nothing of this world."""
    return EverydayWords(telling())


def varied_caption(scene: Scene, rng: np.random.Generator) -> str:
    """A prompt that asks for `scene`, in everyday words at times; seldom one of such words alone, which asks for nothing, and
    for no style least of all."""
    text, chance = caption(scene, rng), rng.random()
    if chance < ONLY_WORDS_SHARE and scene.style == DEFAULT_STYLE:
        return everyday_words().alone(rng)
    if chance >= EVERYDAY_SHARE:
        return text
    before, after = everyday_words().around(rng)
    return before + text + after


def draft(scene: Scene, rng: np.random.Generator, names: Names, *, misspellings: bool = True) -> Draft:
    """A prompt in parts that asks for `scene`, phrased at random with `names`."""
    phrases = tuple(object_phrase(key, rng, names, misspellings=misspellings) for key in scene.objects)
    join = _pick(JOINS, rng)
    absent, negation = None, ""
    if rng.random() < NEGATION_SHARE:
        absent = _pick([key for key in load_vocabulary().objects if key not in scene.objects], rng)
        negation = deny(absent, rng, names)
    style = _pick(names[scene.style], rng)
    background = _pick(BACKGROUND_FORMS, rng).format(scene.background).replace(" a orange", " an orange")
    if scene.style == DEFAULT_STYLE and rng.random() < NO_STYLE_SHARE:
        style = ""
    if rng.random() < NO_BACKGROUND_SHARE:
        background = ""
    background_first = bool(rng.random() < 0.25)
    filler, filler_first = "", False
    if rng.random() < FILLER_SHARE:
        filler, filler_first = _pick(FILLERS, rng), bool(rng.random() >= 0.5)
    chance = rng.random()
    opening = ""
    if chance < LONG_SHARE:
        opening = _pick(LONG_OPENINGS, rng) + " "
    elif chance < PREFIX_SHARE:
        opening = _pick(PREFIXES, rng)
    return Draft(phrases, join, absent, negation, style, background, background_first, filler, filler_first, opening)


def deny(key: str, rng: np.random.Generator, names: Names) -> str:
    """Words that say the object is not to be drawn, such as ", no dog"."""
    phrase = object_phrase(key, rng, names)
    form = _pick(NEGATIONS, rng)
    return form.format(_without_article(phrase) if " no " in form else phrase)


def object_phrase(key: str, rng: np.random.Generator, names: Names, *, misspellings: bool = True) -> str:
    """A name of the object, sometimes misspelt, sometimes its category's word."""
    category = load_vocabulary().objects[key].category
    choice = names[key]
    if category is not None and rng.random() < CATEGORY_SHARE:
        choice = names[category]
    name = _pick(choice, rng)
    slip = rng.random() < MISSPELLING_SHARE
    return misspell(name, rng) if slip and misspellings else name


@cache
def known_words() -> frozenset[str]:
    """Every word that a prompt of this world may hold, spelt right."""
    phrases = [name for names in all_names().values() for name in names]
    phrases += [*PREFIXES, *BACKGROUND_FORMS, *JOINS, *FILLERS, *LONG_OPENINGS, *NEGATIONS, *load_vocabulary().background_keys]
    return frozenset(word for phrase in phrases for word in _words(phrase))


def spelt_right(prompt: str) -> bool:
    """Whether every word is one that this world knows."""
    return known_words().issuperset(_words(prompt))


def _words(phrase: str) -> list[str]:
    return phrase.replace(",", " ").split()


def _pick(choices: Sequence[str], rng: np.random.Generator) -> str:
    return choices[int(rng.integers(len(choices)))]


def _without_article(name: str) -> str:
    first, _, rest = name.partition(" ")
    return rest if first in ("a", "an", "the") else name


def misspell(name: str, rng: np.random.Generator) -> str:
    """`name` with one slip in its longest word: a letter dropped, doubled, or two swapped."""
    words = name.split(" ")
    where = max(range(len(words)), key=lambda i: len(words[i]))
    word = words[where]
    if len(word) < 4:
        return name
    at = int(rng.integers(1, len(word) - 1))
    slip = int(rng.integers(3))
    if slip == 0:
        word = word[:at] + word[at + 1 :]
    elif slip == 1:
        word = word[:at] + word[at] + word[at:]
    else:
        word = word[:at] + word[at + 1] + word[at] + word[at + 2 :]
    words[where] = word
    return " ".join(words)
