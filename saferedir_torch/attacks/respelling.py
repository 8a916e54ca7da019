"""Families to train against alone that write words differently, in ways that no attack is tested with (`text_families.py`)."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable

import numpy as np

from saferedir_torch.attacks.text_families import in_long_words

#: What sounds alike, or nearly so.
SOUNDS = (
    ("ph", "f"), ("f", "ph"), ("ck", "k"), ("ch", "tsh"), ("c", "k"), ("k", "c"), ("s", "z"), ("z", "s"), ("x", "ks"),
    ("qu", "kw"), ("w", "wh"), ("ea", "ee"), ("ee", "ea"), ("oo", "u"), ("ou", "ow"), ("ai", "ay"), ("y", "i"), ("i", "y"),
    ("er", "ur"), ("or", "aw"), ("u", "oo"), ("g", "gh"), ("d", "dd"), ("t", "th"), ("v", "w"), ("j", "dg"), ("e", "eh"),
    ("a", "ah"), ("o", "oh"), ("l", "ll"), ("n", "nn"), ("r", "rr"), ("b", "p"), ("p", "b"), ("m", "mm"), ("h", ""),
)  # fmt: skip
#: Acute, grave, circumflex, tilde, diaeresis, ring, cedilla and caron, to be put on letters.
ACCENTS = "\u0301\u0300\u0302\u0303\u0308\u030a\u0327\u030c"
#: None of them is among the gaps of the family `spacing`.
MARKS = ("/", "'", "|", "+", "~", "*", "^", "=", ":")


def sounds(words: str, rng: np.random.Generator) -> str:
    """Every longer word written as it sounds, in one place or two."""

    def write(word: str) -> str:
        for _ in range(int(rng.integers(1, 3))):
            fitting = [pair for pair in SOUNDS if pair[0] in word]
            if fitting:
                heard, written = fitting[int(rng.integers(len(fitting)))]
                word = word.replace(heard, written, 1)
        return word

    return in_long_words(words, write)


def scrambled(words: str, rng: np.random.Generator) -> str:
    """The inner letters of every longer word in another order."""

    def scramble(word: str) -> str:
        inner = list(word[1:-1])
        rng.shuffle(inner)
        return word[0] + "".join(inner) + word[-1]

    return in_long_words(words, scramble)


def accents(words: str, rng: np.random.Generator) -> str:
    """Accents on one to three letters of every longer word."""

    def accent(word: str) -> str:
        letters = list(word)
        for place in rng.choice(len(letters), min(len(letters), int(rng.integers(1, 4))), replace=False):
            letters[place] += ACCENTS[int(rng.integers(len(ACCENTS)))]
        return unicodedata.normalize("NFC", "".join(letters))

    return in_long_words(words, accent)


def marks(words: str, rng: np.random.Generator) -> str:
    """Every longer word with a mark between two letters or all of them, or around it."""
    mark, kind = MARKS[int(rng.integers(len(MARKS)))], int(rng.integers(3))

    def put(word: str) -> str:
        at = int(rng.integers(1, len(word)))
        return (f"{mark}{word}{mark}", word[:at] + mark + word[at:], mark.join(word))[kind]

    return in_long_words(words, put)


RESPELLINGS: dict[str, Callable[[str, np.random.Generator], str]] = {
    "sounds": sounds, "scrambled": scrambled, "accents": accents, "marks": marks,
}  # fmt: skip
