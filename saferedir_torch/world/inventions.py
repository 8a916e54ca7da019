"""Names that nobody has taught: known phrases with their telling words replaced.

A redirector that has moved such names learns that what it does not know is what the latent shows; a detector that has
read them learns to look at the latent before it accuses a word for being strange.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

#: Words that make the frame of a phrase and are kept.
FRAME = frozenset(["a", "an", "the", "of", "with", "in", "on", "as", "for", "and", "to", "some", "two", "by", "like", "style"])
#: Share of telling words replaced by a word without meaning; the others become words of other things' names.
MEANINGLESS_SHARE = 0.6
_ONSETS = tuple("bcdfghjklmnprstvwz") + ("br", "cr", "dr", "gl", "gr", "pl", "pr", "sh", "sl", "st", "th", "tr")
_VOWELS = ["a", "e", "i", "o", "u", "ai", "ea", "ee", "oo", "ou"]
_ENDINGS = ["", "", "", "n", "r", "l", "s", "t", "ck", "nd", "sk"]


def invent(phrase: str, rng: np.random.Generator, words: Sequence[str]) -> str:
    """`phrase` with every telling word replaced, one of them at least by a meaningless word, others by one of `words`."""
    parts = phrase.split(" ")
    telling = [index for index, word in enumerate(parts) if word not in FRAME]
    meaningless = {index for index in telling if rng.random() < MEANINGLESS_SHARE}
    meaningless |= {telling[rng.integers(len(telling))]} if telling and not meaningless else set()
    for index in telling:
        parts[index] = _meaningless(rng) if index in meaningless else _pick(words, rng)
    return " ".join(parts)


def telling_words(phrases: Iterable[str]) -> list[str]:
    """The words of `phrases` that are not frame, each once, sorted."""
    return sorted({word for phrase in phrases for word in phrase.split(" ")} - FRAME)


def _meaningless(rng: np.random.Generator) -> str:
    syllables = [_pick(_ONSETS, rng) + _pick(_VOWELS, rng) for _ in range(int(rng.integers(1, 4)))]
    return "".join(syllables) + _pick(_ENDINGS, rng)


def _pick(choices: Sequence[str], rng: np.random.Generator) -> str:
    return choices[int(rng.integers(len(choices)))]
