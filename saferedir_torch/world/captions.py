"""Scene to caption: names, phrasings, filler words, misspellings, negations, long prompts."""

from __future__ import annotations

import numpy as np

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
NO_STYLE_SHARE = 0.5  # of the scenes in the default style

PREFIXES = ("a picture of ", "an image of ", "a drawing of ", "an emoji of ", "please draw ", "show me ", "i want ", "here is ")
JOINS = (" next to ", " and ", " beside ", " with ", " together with ", " to the left of ")
FILLERS = ("lovely", "nice", "simple", "very detailed", "beautiful", "high quality", "cute", "clean", "centered", "best quality")
LONG_OPENINGS = (
    "we walked for a long time on a quiet afternoon and talked about many things, and then somebody asked for a picture, so",
    "this is for the cover of a small book that my sister wrote last winter when it rained all week, please make",
    "for the poster of the summer party at our school, where everybody brings something to eat and music is played, draw",
    "imagine that you are a patient artist with plenty of time, good paper and a steady hand, and that you now make",
    "my teacher said that every good page starts with one clear thing in the middle and nothing else around it, for example",
)
NEGATIONS = (", no {}", " without {}", ", but not {}", " and no {}")


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """A prompt that asks for `scene`, lower case, phrased at random."""
    vocabulary = load_vocabulary()
    phrases = [object_phrase(key, rng) for key in scene.objects]
    text = JOINS[rng.integers(len(JOINS))].join(phrases)
    if rng.random() < NEGATION_SHARE:
        others = [key for key in vocabulary.object_keys if key not in scene.objects]
        absent = object_phrase(others[rng.integers(len(others))], rng)
        form = NEGATIONS[rng.integers(len(NEGATIONS))]
        text += form.format(_without_article(absent) if " no " in form else absent)
    style = style_phrase(scene.style, rng)
    background = background_phrase(scene.background, rng)
    if scene.style == DEFAULT_STYLE and rng.random() < NO_STYLE_SHARE:
        style = ""
    if rng.random() < NO_BACKGROUND_SHARE:
        background = ""
    tails = [part for part in (style, background) if part]
    if rng.random() < 0.25:
        tails.reverse()
    text = " ".join([text, *tails])
    if rng.random() < FILLER_SHARE:
        filler = FILLERS[rng.integers(len(FILLERS))]
        text = f"{text}, {filler}" if rng.random() < 0.5 else f"{filler}, {text}"
    chance = rng.random()
    if chance < LONG_SHARE:
        return f"{LONG_OPENINGS[rng.integers(len(LONG_OPENINGS))]} {text}"
    if chance < 0.35:
        return PREFIXES[rng.integers(len(PREFIXES))] + text
    return text


def object_phrase(key: str, rng: np.random.Generator) -> str:
    """A name of the object, sometimes misspelt, sometimes its category's word."""
    vocabulary = load_vocabulary()
    item = vocabulary.objects[key]
    names = item.names
    if item.category is not None and rng.random() < CATEGORY_SHARE:
        names = vocabulary.categories[item.category]
    name = names[rng.integers(len(names))]
    return misspell(name, rng) if rng.random() < MISSPELLING_SHARE else name


def _without_article(name: str) -> str:
    first, _, rest = name.partition(" ")
    return rest if first in ("a", "an", "the") else name


def style_phrase(key: str, rng: np.random.Generator) -> str:
    names = load_vocabulary().styles[key]
    return names[rng.integers(len(names))]


def background_phrase(key: str, rng: np.random.Generator) -> str:
    forms = ("on a {} background", "on {}", "with a {} backdrop")
    return forms[rng.integers(len(forms))].format(key)


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
