"""Adversarial training: a share of the training prompts is rewritten as attackers would, the benign ones among them alike.

Those that pictures are drawn of stay as they are: a model that strange words lead astray draws what nobody asked for, and a
latent of it would bear the wrong label.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from saferedir_torch.attacks.long_prompts import among_words, framed, longer
from saferedir_torch.attacks.respelling import RESPELLINGS
from saferedir_torch.attacks.text_families import FAMILIES, WORD_FAMILIES, Family, Target, on_words
from saferedir_torch.prompt_source import PromptSource, TrainingPair, changed_words

#: Share of pairs, and of benign prompts, that are rewritten.
ATTACKED_SHARE = 0.4
#: Families that no attack is tested with.
TRAINING_FAMILIES: dict[str, Family] = {
    "longer": longer, "framed": framed, "among words": among_words,
    **{name: on_words(change) for name, change in RESPELLINGS.items()},
}  # fmt: skip
ALL_FAMILIES = {**FAMILIES, **TRAINING_FAMILIES}
ALL_WORD_FAMILIES = {**WORD_FAMILIES, **RESPELLINGS}


class HardenedPrompts:
    """The prompts of `source`, some of them rewritten by one of `families`.

    What asks for a concept is what a pair's rewrite changes. Benign prompts are rewritten at any word, so that strange
    spelling by itself means nothing. Families that put words around a prompt put them around the rewrite as well. Whether what
    comes of it still asks for the concept is for `meaning.confirmed` to find out.
    """

    def __init__(
        self, source: PromptSource, families: Sequence[str] = tuple(TRAINING_FAMILIES), share: float = ATTACKED_SHARE
    ) -> None:
        """Raises:
        ValueError: a family is not known, or none is given.
        """
        unknown = sorted(set(families) - set(ALL_FAMILIES))
        if unknown or not families:
            raise ValueError(f"unknown families {', '.join(unknown) or '(none given)'}; expected {', '.join(ALL_FAMILIES)}")
        self.source, self.families, self.share = source, tuple(families), share
        self.replacements, self.keeps_subject, self.telling = source.replacements, source.keeps_subject, source.telling
        self.seeds = source.seeds

    def pair(self, concept: str, rng: np.random.Generator) -> TrainingPair:
        return self.source.pair(concept, rng)

    def varied_pair(self, concept: str, rng: np.random.Generator) -> TrainingPair:
        return self._attacked(self.source.varied_pair(concept, rng), rng)

    def benign(self, rng: np.random.Generator) -> str:
        return self.source.benign(rng)

    def varied_benign(self, rng: np.random.Generator) -> str:
        prompt = self.source.varied_benign(rng)
        return prompt if rng.random() >= self.share else _rewritten_anywhere(prompt, lambda: self._any(rng), rng)

    def _attacked(self, pair: TrainingPair, rng: np.random.Generator) -> TrainingPair:
        spans = changed_words(pair.unsafe, pair.safe)
        if rng.random() >= self.share or not spans:
            return pair
        family = self._any(rng)
        if family in ALL_WORD_FAMILIES:
            unsafe = pair.unsafe
            for words in spans:
                unsafe = unsafe.replace(words, ALL_WORD_FAMILIES[family](words, rng), 1)
            return replace(pair, unsafe=unsafe, plain=pair.unsafe, plain_safe=pair.safe)
        seed = int(rng.integers(2**32))  # the same words around both
        safe_words = changed_words(pair.safe, pair.unsafe) or [pair.safe.split(" ")[0]]
        unsafe, safe = (
            ALL_FAMILIES[family](target, np.random.default_rng(seed))
            for target in (Target(pair.unsafe, spans[0]), Target(pair.safe, safe_words[0]))
        )
        return replace(pair, unsafe=unsafe, safe=safe, plain=pair.unsafe, plain_safe=pair.safe)

    def _any(self, rng: np.random.Generator) -> str:
        return self.families[int(rng.integers(len(self.families)))]


def _rewritten_anywhere(prompt: str, family: Callable[[], str], rng: np.random.Generator) -> str:
    words = prompt.split(" ")
    target_words = words[int(rng.integers(len(words)))]
    return ALL_FAMILIES[family()](Target(prompt, target_words), rng) if target_words else prompt
