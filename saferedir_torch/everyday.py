"""Everyday words around a prompt: what users write besides naming a thing, and what is to change nothing."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import numpy as np

from saferedir_torch.prompt_source import PromptSource, TrainingPair

WORDS_FILE = Path(__file__).with_name("everyday.txt")
#: Share of such words that are no words at all.
MEANINGLESS_SHARE = 0.15
#: Share of them with a weight, as in "(soft:1.2)".
WEIGHTED_SHARE = 0.05
MOST_WORDS = 9
#: Share of prompts with everyday words around them, and of varied benign ones that are such words alone.
EVERYDAY_SHARE, ONLY_WORDS_SHARE = 0.35, 0.15
_ONSETS = tuple("bcdfghjklmnprstvwz") + ("br", "cr", "dr", "gl", "gr", "pl", "pr", "sh", "sl", "st", "th", "tr")
_VOWELS = ("a", "e", "i", "o", "u", "ai", "ea", "ee", "oo", "ou")
_ENDINGS = ("", "", "", "n", "r", "l", "s", "t", "ck", "nd", "sk")


class EverydayWords:
    """The words of `everyday.txt`, without some that mean something where they are used."""

    def __init__(self, without: Collection[str]) -> None:
        lines = (line for line in WORDS_FILE.read_text(encoding="utf-8").splitlines() if not line.startswith("#"))
        words = dict.fromkeys(word for line in lines for word in line.split())
        self.words = tuple(word for word in words if word not in without)

    def around(self, rng: np.random.Generator) -> tuple[str, str]:
        """What to put before and after a prompt; one of both may be empty."""
        joint, between = ", " if rng.random() < 0.7 else " ", ", " if rng.random() < 0.4 else " "
        where = int(rng.integers(3))
        before = between.join(self._some(rng)) + joint if where != 1 else ""
        after = joint + between.join(self._some(rng)) if where != 0 else ""
        return before, after

    def alone(self, rng: np.random.Generator) -> str:
        """A prompt of such words and nothing else."""
        return (", " if rng.random() < 0.4 else " ").join(self._some(rng))

    def _some(self, rng: np.random.Generator) -> list[str]:
        return [self._any(rng) for _ in range(int(rng.integers(1, MOST_WORDS + 1)))]

    def _any(self, rng: np.random.Generator) -> str:
        if rng.random() < MEANINGLESS_SHARE:
            return meaningless(rng)
        word = self.words[int(rng.integers(len(self.words)))]
        return f"({word}:1.{int(rng.integers(1, 6))})" if rng.random() < WEIGHTED_SHARE else word


class EverydayPrompts:
    """The prompts of `source`, a share of them with everyday words around; and some benign ones of nothing else."""

    def __init__(self, source: PromptSource) -> None:
        self.source, self.words = source, EverydayWords(source.telling)
        self.replacements, self.keeps_subject, self.seeds = source.replacements, source.keeps_subject, source.seeds
        self.telling = source.telling

    def pair(self, concept: str, rng: np.random.Generator) -> TrainingPair:
        return self._around(self.source.pair(concept, rng), rng)

    def varied_pair(self, concept: str, rng: np.random.Generator) -> TrainingPair:
        return self._around(self.source.varied_pair(concept, rng), rng)

    def benign(self, rng: np.random.Generator) -> str:
        return surrounded(self.source.benign(rng), self.words, rng)

    def varied_benign(self, rng: np.random.Generator) -> str:
        alone = rng.random() < ONLY_WORDS_SHARE
        return self.words.alone(rng) if alone else surrounded(self.source.varied_benign(rng), self.words, rng)

    def _around(self, pair: TrainingPair, rng: np.random.Generator) -> TrainingPair:
        """The pair, at times with the same words around all its prompts."""
        before, after = self.words.around(rng) if rng.random() < EVERYDAY_SHARE else ("", "")
        changed = {
            side: before + text + after
            for side in ("unsafe", "safe", "plain", "plain_safe")
            if (text := getattr(pair, side))
        }  # fmt: skip
        return replace(pair, **changed)


def surrounded(prompt: str, words: EverydayWords, rng: np.random.Generator) -> str:
    """`prompt`, at times with everyday words around it."""
    if rng.random() >= EVERYDAY_SHARE:
        return prompt
    before, after = words.around(rng)
    return before + prompt + after


def meaningless(rng: np.random.Generator) -> str:
    """A word of one to three syllables that nobody has taught."""
    syllables = [_pick(_ONSETS, rng) + _pick(_VOWELS, rng) for _ in range(int(rng.integers(1, 4)))]
    return "".join(syllables) + _pick(_ENDINGS, rng)


def _pick(choices: tuple[str, ...], rng: np.random.Generator) -> str:
    return choices[int(rng.integers(len(choices)))]
