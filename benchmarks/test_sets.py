"""The prompts and seeds that modules are tested on: held-out companions, seeds of the split's test range."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from saferedir_torch.world.captions import all_names
from saferedir_torch.world.prompts import (
    CONCEPTS,
    LATER_CONCEPTS,
    Part,
    PromptPair,
    WorldConcept,
    evaluation_pairs,
    pair_prompt,
)
from saferedir_torch.world.split import Split

#: Words of the seed sequences, so that no two sets share prompts or seeds.
UNSAFE, REWRITES, JOINT = 61, 63, 65


@dataclass(frozen=True)
class UnsafeSet:
    """Pairs and picture seeds, every prompt once a seed: prompt after prompt, all its seeds in a row."""

    pairs: list[PromptPair]
    seeds: list[int]

    @property
    def names(self) -> list[str]:
        return [pair.name for pair in self.pairs]

    @property
    def prompts(self) -> list[str]:
        return [pair.unsafe for pair in self.pairs]

    def first_seeds(self, per_prompt: int) -> npt.NDArray[np.int64]:
        """Rows of the first of each prompt's `per_prompt` seeds."""
        return np.arange(0, len(self.pairs), per_prompt)

    def rows(self, index: Iterable[int]) -> UnsafeSet:
        """Some of the rows."""
        chosen = list(index)
        return UnsafeSet([self.pairs[row] for row in chosen], [self.seeds[row] for row in chosen])

    def spread(self, count: int) -> UnsafeSet:
        """`count` rows at equal distances, so that every name has its share, or all where there are fewer."""
        return self.rows(range(0, len(self.pairs), max(len(self.pairs) // count, 1))[:count])


def unsafe_set(concept: WorldConcept, split: Split, part: Part, prompts: int, per_prompt: int, seed: int = 0) -> UnsafeSet:
    """`prompts` different prompts that ask for `concept` alone, with `per_prompt` seeds each."""
    others = [other for other in CONCEPTS.values() if other is not concept]
    distinct: dict[str, PromptPair] = {}
    for pair in evaluation_pairs(concept, split, part, 2 * prompts, seed=seed + (part == "held_out"), avoid=others):
        if len(distinct) < prompts:
            distinct.setdefault(pair.unsafe, pair)
    pairs = [pair for pair in distinct.values() for _ in range(per_prompt)]
    return UnsafeSet(
        pairs, _test_seeds(split, [seed, UNSAFE, len(part), list(CONCEPTS | LATER_CONCEPTS).index(concept.name)], len(pairs))
    )


def joint_set(wanted: Sequence[WorldConcept], split: Split, count: int, seed: int = 0) -> UnsafeSet:
    """`count` prompts that ask for all of `wanted` at once, with seen names and held-out companions, one seed each."""
    stream = [seed, JOINT, *(list(CONCEPTS).index(concept.name) for concept in wanted)]
    rng = np.random.default_rng(stream)
    others = [other for other in CONCEPTS.values() if other not in wanted]
    pairs = [
        pair_prompt(wanted, rng, split.names, split.held_out_companions, avoid=others, misspellings=False) for _ in range(count)
    ]
    return UnsafeSet(pairs, _test_seeds(split, [*stream, 1], count))


def validation_rewrites(concept: WorldConcept, split: Split, count: int, seed: int = 0) -> tuple[list[str], list[int]]:
    """Safe rewrites and seeds that the judge's threshold is set on.

    They are drawn as the tested ones are, with the companions of those, since what a judge mistakes for a concept depends on
    what stands beside it. The prompts are drawn anew (some coincide with tested ones), the seeds are those of validation.
    """
    rng = np.random.default_rng([seed, REWRITES])
    others = [other for other in CONCEPTS.values() if other is not concept]
    pairs = [
        pair_prompt([concept], rng, all_names(), split.held_out_companions, avoid=others, misspellings=False)
        for _ in range(count)
    ]
    return [pair.safe for pair in pairs], [int(value) for value in rng.integers(*split.seeds["validation"], size=count)]


def _test_seeds(split: Split, stream: list[int], count: int) -> list[int]:
    return [int(value) for value in np.random.default_rng(stream).integers(*split.seeds["test"], size=count)]
