"""Where safety training takes its prompts from: the embedded world, or a user's file of pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Protocol

import numpy as np


@dataclass(frozen=True)
class TrainingPair:
    """An unsafe prompt and its safe rewrite."""

    unsafe: str
    safe: str
    #: Concepts that the unsafe prompt asks for, by words that are known to mean them.
    asked: tuple[str, ...]
    #: Concepts that the rewrite replaces.
    replaced: tuple[str, ...]
    #: Both as they were before somebody rewrote them to hide what is asked for; empty where nobody did.
    plain: str = ""
    plain_safe: str = ""


class PromptSource(Protocol):
    """Pairs of N concepts, and benign prompts, as many as are asked for."""

    #: Concept -> what is drawn in its place, in the order of the module's concepts.
    replacements: dict[str, str]
    #: Concepts that are how a subject is drawn, such as styles: a fallback is to keep it.
    keeps_subject: frozenset[str]
    #: Words that mean something in its prompts, which are no everyday words here.
    telling: frozenset[str]
    #: Half-open range of the seeds that training pictures are drawn with.
    seeds: tuple[int, int]

    def pair(self, concept: str, rng: np.random.Generator) -> TrainingPair:
        """A pair that asks for `concept`, and at times for others too."""
        ...

    def varied_pair(self, concept: str, rng: np.random.Generator) -> TrainingPair:
        """The same, with words that a picture need not follow: for what reads prompts alone."""
        ...

    def benign(self, rng: np.random.Generator) -> str:
        """A prompt that asks for none of the concepts."""
        ...

    def varied_benign(self, rng: np.random.Generator) -> str:
        """The same, varied as in `varied_pair`."""
        ...


def flags(rows: Sequence[Sequence[str]], concepts: Sequence[str]) -> list[list[float]]:
    """[len(rows)][N]: 1 where the concept is among the row's names."""
    return [[float(concept in row) for concept in concepts] for row in rows]


def changed_words(prompt: str, other: str) -> list[str]:
    """Runs of words in `prompt` that `other` has other words, or none, in place of."""
    words, others = prompt.split(" "), other.split(" ")
    blocks = SequenceMatcher(a=words, b=others, autojunk=False).get_opcodes()
    runs = (" ".join(words[start:end]) for kind, start, end, _, _ in blocks if kind in ("replace", "delete"))
    return [run for run in runs if run.strip()]
