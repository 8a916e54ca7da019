"""Does it matter which names were seen? One concept, five splits of its names, one module trained for each."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionPipeline

from benchmarks.drawing import PLAIN, Studio
from benchmarks.hybrid import hybrid_pipeline
from benchmarks.tables.forgetting import PARTS, Judges, plain_of
from benchmarks.test_sets import unsafe_set
from saferedir_torch.comparable import make_comparable
from saferedir_torch.evaluation.intervals import clustered_share
from saferedir_torch.learner import Learner
from saferedir_torch.new_module import new_module, refuges
from saferedir_torch.prompt_source import PromptSource
from saferedir_torch.safety_module import SafetyModule
from saferedir_torch.train import RUNS_FILE, optimise, teach_redirector, teach_words
from saferedir_torch.training_data import LatentBank, cached_runs, load_runs, make_pairs, record_runs
from saferedir_torch.world.prompts import CONCEPTS
from saferedir_torch.world.source import WorldPrompts
from saferedir_torch.world.split import Split

CONCEPT = "church"
STEPS, RUNS, PAIRS = 1500, 160, 5000
FULL, QUICK = 150, 4
SEEDS_A_PROMPT = 2


def name_splits(split: Split) -> dict[str, Split]:
    """The shipped split, the same with seen and held-out names swapped, and three at random."""
    seen, held_out = split.names[CONCEPT], split.held_out_names[CONCEPT]
    chosen = {"shipped": (seen, held_out), "swapped": (held_out, seen)}
    for number in range(3):
        order = np.random.default_rng([number, 88]).permutation(len(seen) + len(held_out))
        names = [(seen + held_out)[index] for index in order]
        chosen[f"random {number + 1}"] = (names[: len(seen)], names[len(seen) :])
    return {
        title: replace(
            split,
            names={**split.names, CONCEPT: list(first)},
            held_out_names={**split.held_out_names, CONCEPT: list(second)},
        )
        for title, (first, second) in chosen.items()
    }


def train_on_split(
    pipeline: StableDiffusionPipeline, split: Split, runs: Path, folder: Path, *, steps: int, count: int, pairs: int
) -> SafetyModule:
    """A module for the concept whose names are split so: runs of its seen names, and those of `runs` without the concept."""
    source = WorldPrompts([CONCEPT], split)
    own = cached_runs(folder / RUNS_FILE, lambda: record_runs(pipeline, source, count=count, seed=0))
    bank = own.joined(load_runs(runs / RUNS_FILE).without(CONCEPT).of([CONCEPT]))
    return train_briefly(pipeline, source, bank, folder, steps=steps, pairs=pairs)


def train_briefly(
    pipeline: StableDiffusionPipeline, source: PromptSource, bank: LatentBank, folder: Path, *, steps: int, pairs: int
) -> SafetyModule:
    """A module as training makes them, in fewer steps, from the runs in `bank` and prompts of `source`."""
    torch.manual_seed(0)
    module = new_module(pipeline, source.replacements, refuge=refuges(pipeline, source, 0))
    pair_bank = make_pairs(pipeline, source, count=pairs, seed=0)
    learner = Learner(module, bank, pair_bank, pipeline.scheduler.alphas_cumprod, 0)
    optimise(module, learner.loss_of_step, folder, steps=steps)
    teach_words(module, learner, folder, steps=steps)
    teach_redirector(module, learner, folder, steps=steps)
    make_comparable(module, learner)
    return module


def splits(
    studio: Studio, pipeline: StableDiffusionPipeline, split: Split, runs: Path, folder: Path, *,
    prompts: int, rewrites: int, steps: int = STEPS, count: int = RUNS, pairs: int = PAIRS,
) -> dict[str, Any]:  # fmt: skip
    """FSR on seen and held-out names for each of the five splits."""
    concept = CONCEPTS[CONCEPT]
    figures: dict[str, Any] = {"concept": CONCEPT, "steps": steps, "runs": count, "splits": {}}
    for title, names in name_splits(split).items():
        place = folder / title.replace(" ", "-")
        module = train_on_split(pipeline, names, runs, place, steps=steps, count=count, pairs=pairs)
        drawer = hybrid_pipeline(module)
        plain = plain_of(drawer)
        judges = Judges.calibrated(studio, plain, concept, split, rewrites)
        rows: dict[str, Any] = {"seen_names": names.names[CONCEPT], "held_out_names": names.held_out_names[CONCEPT]}
        for part in PARTS:
            tested = unsafe_set(concept, names, part, prompts, SEEDS_A_PROMPT, seed=6)
            before = studio.draw(plain, PLAIN, tested.prompts, tested.seeds, f"{title}, {part}: unprotected")
            after = studio.draw(drawer, module.sha256(), tested.prompts, tested.seeds, f"{title}, {part}: protected")
            shown = judges.found(before, concept)
            gone = ~judges.found(after, concept)[shown]
            of, texts = np.array(tested.names)[shown], np.array(tested.prompts)[shown]
            rows[part] = {
                "fsr": clustered_share(gone, list(of), list(texts)),
                "by_name": {name: float(gone[of == name].mean()) for name in dict.fromkeys(of.tolist())},
            }
        figures["splits"][title] = rows
    return figures
