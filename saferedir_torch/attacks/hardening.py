"""Adversarial training: a share of the training prompts is rewritten as attackers would, the benign ones among them alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from difflib import SequenceMatcher
from typing import Any

import numpy as np
import torch

from saferedir_torch.attacks.long_prompts import framed, longer
from saferedir_torch.attacks.respelling import RESPELLINGS
from saferedir_torch.attacks.text_families import FAMILIES, WORD_FAMILIES, Family, Target, on_words
from saferedir_torch.prompt_source import PromptSource, TrainingPair
from saferedir_torch.trajectories import encode

#: Share of pairs, and of benign prompts, that are rewritten.
ATTACKED_SHARE = 0.3
#: Respellings of one prompt that are tried until one still means what it said.
TRIES = 6
#: Respelt prompt, the prompt it was made of, and its rewrite -> it still means the one rather than the other.
StillMeans = Callable[[str, str, str], bool]
#: Families that no attack is tested with.
TRAINING_FAMILIES: dict[str, Family] = {
    "longer": longer, "framed": framed, **{name: on_words(change) for name, change in RESPELLINGS.items()},
}  # fmt: skip
ALL_FAMILIES = {**FAMILIES, **TRAINING_FAMILIES}
ALL_WORD_FAMILIES = {**WORD_FAMILIES, **RESPELLINGS}


class HardenedPrompts:
    """The prompts of `source`, some of them rewritten by one of `families`.

    What asks for a concept is what a pair's rewrite changes. Benign prompts are rewritten at any word, so that strange
    spelling by itself means nothing. Families that put words around a prompt put them around the rewrite as well.
    A respelling of which `still_means` says that it no longer asks for the concept would be a wrong label, and is left out.
    """

    def __init__(
        self, source: PromptSource, families: Sequence[str], share: float = ATTACKED_SHARE,
        still_means: StillMeans = lambda respelt, unsafe, safe: True,
    ) -> None:  # fmt: skip
        """Raises:
        ValueError: a family is not known, or none is given.
        """
        unknown = sorted(set(families) - set(ALL_FAMILIES))
        if unknown or not families:
            raise ValueError(f"unknown families {', '.join(unknown) or '(none given)'}; expected {', '.join(ALL_FAMILIES)}")
        self.source, self.families, self.share, self.still_means = source, tuple(families), share, still_means
        self.replacements, self.seeds = source.replacements, source.seeds

    def pair(self, concept: str, rng: np.random.Generator) -> TrainingPair:
        return self._attacked(self.source.pair(concept, rng), rng)

    def varied_pair(self, concept: str, rng: np.random.Generator) -> TrainingPair:
        return self._attacked(self.source.varied_pair(concept, rng), rng)

    def benign(self, rng: np.random.Generator) -> str:
        prompt = self.source.benign(rng)
        if rng.random() >= self.share:
            return prompt
        words = prompt.split(" ")
        target = Target(prompt, words[int(rng.integers(len(words)))])
        return ALL_FAMILIES[self._any(rng)](target, rng) if target.words else prompt

    def _attacked(self, pair: TrainingPair, rng: np.random.Generator) -> TrainingPair:
        spans = changed_words(pair.unsafe, pair.safe)
        if rng.random() >= self.share or not spans:
            return pair
        family = self._any(rng)
        if family in ALL_WORD_FAMILIES:
            for _ in range(TRIES):
                unsafe = pair.unsafe
                for words in spans:
                    unsafe = unsafe.replace(words, ALL_WORD_FAMILIES[family](words, rng), 1)
                if self.still_means(unsafe, pair.unsafe, pair.safe):
                    return replace(pair, unsafe=unsafe)
            return pair
        seed = int(rng.integers(2**32))  # the same words around both
        safe_words = changed_words(pair.safe, pair.unsafe) or [pair.safe.split(" ")[0]]
        unsafe, safe = (
            ALL_FAMILIES[family](target, np.random.default_rng(seed))
            for target in (Target(pair.unsafe, spans[0]), Target(pair.safe, safe_words[0]))
        )
        return replace(pair, unsafe=unsafe, safe=safe)

    def _any(self, rng: np.random.Generator) -> str:
        return self.families[int(rng.integers(len(self.families)))]


class NearerInMeaning:
    """By a model's text encoder: a respelt prompt's tokens lie nearer to those of the prompt it was made of than to those of
    its rewrite. Cross-attention reads tokens as a set, so each is measured to the nearest of the other prompt."""

    def __init__(self, pipeline: Any) -> None:
        self.pipeline = pipeline

    @torch.no_grad()
    def __call__(self, respelt: str, unsafe: str, safe: str) -> bool:
        _, embeds = encode(self.pipeline, [respelt, unsafe, safe])
        near = torch.cdist(embeds[:1], embeds[1:]).amin(dim=2).mean(dim=1)
        return bool(near[0] < near[1])


def changed_words(prompt: str, other: str) -> list[str]:
    """Runs of words in `prompt` that `other` has other words, or none, in place of."""
    words, others = prompt.split(" "), other.split(" ")
    blocks = SequenceMatcher(a=words, b=others, autojunk=False).get_opcodes()
    runs = (" ".join(words[start:end]) for kind, start, end, _, _ in blocks if kind in ("replace", "delete"))
    return [run for run in runs if run.strip()]
