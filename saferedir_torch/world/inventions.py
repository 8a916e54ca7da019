"""Names that nobody has taught: known phrases with their telling words replaced.

A redirector that has moved such names learns that what it does not know is what the latent shows; a detector that has
read them learns to look at the latent before it accuses a word for being strange.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from saferedir_torch.everyday import meaningless

#: Words that make the frame of a phrase and are kept.
FRAME = frozenset(["a", "an", "the", "of", "with", "in", "on", "as", "for", "and", "to", "some", "two", "by", "like", "style"])
#: Share of telling words replaced by a word without meaning; the others become words of other things' names.
MEANINGLESS_SHARE = 0.6


def invent(phrase: str, rng: np.random.Generator, words: Sequence[str]) -> str:
    """`phrase` with every telling word replaced, one of them at least by a meaningless word, others by one of `words`."""
    parts = phrase.split(" ")
    telling = [index for index, word in enumerate(parts) if word not in FRAME]
    strange = {index for index in telling if rng.random() < MEANINGLESS_SHARE}
    strange |= {telling[rng.integers(len(telling))]} if telling and not strange else set()
    for index in telling:
        parts[index] = meaningless(rng) if index in strange else _pick(words, rng)
    return " ".join(parts)


def telling_words(phrases: Iterable[str]) -> list[str]:
    """The words of `phrases` that are not frame, each once, sorted."""
    return sorted({word for phrase in phrases for word in phrase.split(" ")} - FRAME)


def _pick(choices: Sequence[str], rng: np.random.Generator) -> str:
    return choices[int(rng.integers(len(choices)))]
