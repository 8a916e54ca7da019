"""In which pictures of the other tables the first step fires otherwise with levels of its own than it did without.

Levels of its own change nothing but what the first step fires for: where that is the same, all that follows is the same but for
rounding. So a table that was measured before holds but for the pictures that are named here.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations
from typing import Any

import torch
from rich.progress import track
from torch import Tensor

from benchmarks.tables import added, benign, cooldown, forgetting, interference, strength, transfer
from benchmarks.test_sets import UnsafeSet, joint_set, unsafe_set
from saferedir_torch.evaluation.intervals import share
from saferedir_torch.prompt_levels import fires_first, first_timestep
from saferedir_torch.safety_module import HIGHEST, SafetyModule
from saferedir_torch.world.prompts import CONCEPTS, LATER_CONCEPTS, benign_set
from saferedir_torch.world.split import Split

#: Of a table's pictures that differ, so many are named.
NAMED = 8
#: Timestep that the four steps of a latent consistency model begin at.
OF_FEW_STEPS = 999.0
#: Seeds a prompt of the stored transfer table; prompts and seeds of the added concept's.
TRANSFER_SEEDS, ADDED = 2, (100, 3)


def first_step(pipeline: Any, module: SafetyModule, split: Split, *, most: int | None = None) -> dict[str, Any]:
    """For each table how many of its pictures' first steps fire otherwise, and for what prompts; of `most` pictures a set."""
    usual = first_timestep(pipeline, transfer.USUAL[0])
    sets = [(table, prompts[:most], seeds[:most], begin) for table, prompts, seeds, begin in _sets(split, usual)]
    tables: dict[str, dict[str, Any]] = {}
    for table, prompts, seeds, begin in track(sets, description="first steps"):
        with_own, without = (_fires(pipeline, module, prompts, seeds, begin, own=own) for own in (True, False))
        differs = (with_own != without).any(dim=1)
        row = tables.setdefault(table, {"pictures": 0, "differ": 0, "prompts": []})
        row["pictures"] += len(prompts)
        row["differ"] += int(differs.sum())
        row["prompts"] += [prompts[at] for at in torch.where(differs)[0].tolist()][: NAMED - len(row["prompts"])]
    pictures, differ = (sum(row[key] for row in tables.values()) for key in ("pictures", "differ"))
    return {"tables": tables, "together": share(differ, pictures)}


def _fires(pipeline: Any, module: SafetyModule, prompts: list[str], seeds: list[int], begin: float, *, own: bool) -> Tensor:
    """[R, N] bool, with the first step's own level or without."""
    branch = module.last_branch
    kept = branch.prompt_levels.clone()
    try:
        if not own:
            branch.prompt_levels.fill_(HIGHEST)
        return fires_first(pipeline, module, prompts, seeds, begin)
    finally:
        branch.prompt_levels.copy_(kept)


def _sets(split: Split, usual: float) -> Iterator[tuple[str, list[str], list[int], float]]:
    """Table, prompts, seeds and the first timestep of what they draw under safety."""

    def unsafe(table: str, tested: UnsafeSet, begin: float = usual) -> tuple[str, list[str], list[int], float]:
        return table, tested.prompts, tested.seeds, begin

    def harmless(table: str, count: int, seed: int, begin: float = usual) -> tuple[str, list[str], list[int], float]:
        asked, seeds = benign_set(split, "test", count, seed=seed)
        return table, [prompt.text for prompt in asked], seeds, begin

    yield harmless("benign", benign.FULL, 0)
    yield harmless("interference", interference.FULL, 1)
    yield harmless("added", added.FULL, 5)
    for begin in (usual, OF_FEW_STEPS):
        yield harmless("transfer", transfer.Size.benign, transfer.TEST_SEED, begin)
    for size in (2, 3):
        for wanted in combinations(CONCEPTS.values(), size):
            yield unsafe("interference", joint_set(wanted, split, interference.FULL))
    for concept in CONCEPTS.values():
        yield unsafe("interference", unsafe_set(concept, split, "seen", interference.FULL, 1, seed=2))
        yield unsafe("added", unsafe_set(concept, split, "seen", added.FULL, 1, seed=5))
        yield unsafe("strength", unsafe_set(concept, split, "held_out", strength.FULL, 1, seed=4))
        yield unsafe("cooldown", unsafe_set(concept, split, "held_out", cooldown.FULL, 1, seed=4))
        for part in forgetting.PARTS:
            whole = forgetting.Size()
            tested = unsafe_set(concept, split, part, whole.prompts, whole.per_prompt, seed=forgetting.TEST_SEED)
            yield unsafe(f"forgetting, {concept.name}", tested)
            for begin in (usual, OF_FEW_STEPS):
                tested = unsafe_set(concept, split, part, transfer.Size.prompts, TRANSFER_SEEDS, seed=transfer.TEST_SEED)
                yield unsafe("transfer", tested, begin)
    for concept in LATER_CONCEPTS.values():
        for part in forgetting.PARTS:
            yield unsafe("added", unsafe_set(concept, split, part, *ADDED, seed=forgetting.TEST_SEED))
