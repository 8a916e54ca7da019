"""A concept that lives in a relation: its prompts, and its table on an untrained module."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from benchmarks.small_pipeline import SMALL
from saferedir_torch.models import load_pipeline
from saferedir_torch.new_module import new_module
from saferedir_torch.world.captions import all_names
from saferedir_torch.world.relation import KINDS, Kind, RelationPrompts, animals_of, harmless, relation_tests
from saferedir_torch.world.split import load_split
from saferedir_torch.world.vocabulary import load_vocabulary

SPLIT = load_split()
WEAPONS, ANIMALS = (set(load_vocabulary().members(category)) for category in ("weapon", "animal"))


def test_training_asks_for_both_and_replaces_the_weapon() -> None:
    source = RelationPrompts(SPLIT)
    for seed in range(100):
        pair = source.pair("armed_animal", np.random.default_rng(seed))
        assert pair.unsafe != pair.safe
        assert "balloon" in pair.safe
        assert pair.asked == pair.replaced == ("armed_animal",)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_harmless_never_shows_both(kind: Kind) -> None:
    for seed in range(200):
        _, shown = harmless(kind, np.random.default_rng(seed), all_names(), SPLIT.companions)
        armed, animal = bool(WEAPONS & set(shown)), bool(ANIMALS & set(shown))
        assert (armed, animal) == {"weapon": (True, False), "animal": (False, True), "neither": (False, False)}[kind]


def test_tests_are_of_animals_that_training_never_pairs() -> None:
    seen, held_out = set(animals_of(SPLIT.companions)), set(animals_of(SPLIT.held_out_companions))
    assert not seen & held_out
    tested = relation_tests(SPLIT, "held_out", 100, seed=0)
    assert {pair.animal for pair in tested} <= held_out
    assert {pair.weapon for pair in tested} <= WEAPONS
    taught = {name for weapon in (*WEAPONS, "weapon") for name in SPLIT.names[weapon]}
    assert not {pair.name for pair in tested} & taught
    assert {pair.animal for pair in relation_tests(SPLIT, "seen", 100, seed=0, companions=SPLIT.companions)} <= seen


@pytest.mark.slow
def test_the_table_is_measured(few_steps: None, tmp_path: Path) -> None:
    from benchmarks.evaluate import app
    from benchmarks.html_report import write_report
    from benchmarks.tables.relation import TESTED

    new_module(load_pipeline(), RelationPrompts(SPLIT), 0, **SMALL).save(tmp_path / "safety")
    options = ["--safety", str(tmp_path / "safety"), "--quick", "--out", str(tmp_path), "--work", str(tmp_path / "work")]
    assert CliRunner().invoke(app, ["relation", *options], catch_exceptions=False).exit_code == 0
    stored = json.loads((tmp_path / "relation.json").read_text())
    assert set(stored["harmless"]) == set(KINDS)
    assert set(stored) >= set(TESTED)
    assert set(stored["ladder"]) == {"unprotected", "rewrite", "formula"}
    assert "A concept in a relation" in write_report(tmp_path).read_text()
