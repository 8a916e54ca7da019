"""Benign prompts that thresholds are calibrated on: a file's, or the embedded world's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from saferedir.engines.errors import RequestError
from saferedir.engines.text_files import read_prompts


def benign_prompts(path: Path | None, count: int, seed: int, concepts: Sequence[str]) -> tuple[list[str], list[int], str]:
    """Prompts, seeds and what they are; a file's prompts are taken in turn until there are `count`.

    Prompts of the embedded world ask for nothing of the shipped concepts, nor of `concepts`.

    Raises:
        RequestError: there are none.
    """
    if count < 1:
        raise RequestError("at least one picture must be drawn")
    if path is None:
        from saferedir_torch.everyday import surrounded
        from saferedir_torch.world.captions import everyday_words
        from saferedir_torch.world.prompts import CONCEPTS, LATER_CONCEPTS, benign_set
        from saferedir_torch.world.split import load_split

        absent = [*CONCEPTS.values(), *(own for name, own in LATER_CONCEPTS.items() if name in concepts)]
        asked, seeds = benign_set(load_split(), "validation", count, seed=seed, concepts=absent)
        rng = np.random.default_rng([seed, 26])
        texts = [surrounded(prompt.text, everyday_words(), rng) for prompt in asked]
        return texts, seeds, "prompts of the embedded world, half of them near neighbours, a third among everyday words"
    lines = read_prompts(path)
    texts = [lines[index % len(lines)] for index in range(count)]
    return texts, [1_000_000 * (seed + 1) + index for index in range(count)], f"{len(lines)} prompts of {path.name}"
