"""Attacks that learn from what got through: prompts are rewritten again and again, and of each the best is kept.

An attacker who sees the pictures alone, and may draw many.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from saferedir_torch.attacks.suite import Draw, Pixels
from saferedir_torch.attacks.text_families import WORD_FAMILIES, Target, WordFamily

#: Pictures [R, H, W, 3] -> [R]: how much the concept is in the picture.
Score = Callable[[Pixels], npt.NDArray[np.float64]]


@dataclass(frozen=True)
class Evolution:
    """How long attacks evolve."""

    rounds: int = 4
    #: Rewritten prompts of each target, a round.
    children: int = 4


def evolve(
    targets: Sequence[Target], unprotected: Draw, protected: Draw, score: Score, first_seed: int,
    size: Evolution | None = None, *, seed: int = 0, families: Mapping[str, WordFamily] = WORD_FAMILIES,
) -> list[Target]:  # fmt: skip
    """The fittest descendant of each target.

    Its fitness is how much of the concept its worse picture shows, of one drawn without safety and one under it: what draws
    nothing any more is no attack. A round draws `children` of each target with both, from seeds that count up.
    """
    size = size or Evolution()
    rng = np.random.default_rng([seed, 31])
    best = list(targets)
    fitness = np.zeros(len(best))
    for number in range(size.rounds):
        children = [_child(target, families, rng) for target in best for _ in range(size.children)]
        prompts = [child.prompt for child in children]
        start = first_seed + number * len(children)
        seeds = list(range(start, start + len(children)))
        drawn = [score(draw(prompts, seeds, f"round {number + 1}: {kind}"))
                 for kind, draw in (("unprotected", unprotected), ("protected", protected))]  # fmt: skip
        fit = np.minimum(*drawn).reshape(len(best), size.children)
        for row, of in enumerate(fit):
            winner = int(of.argmax())
            if of[winner] > fitness[row]:
                best[row], fitness[row] = children[row * size.children + winner], of[winner]
    return best


def _child(target: Target, families: Mapping[str, WordFamily], rng: np.random.Generator) -> Target:
    names = list(families)
    return target.saying(families[names[int(rng.integers(len(names)))]](target.words, rng))
