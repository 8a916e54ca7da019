"""A concept added to a finished module leaves the others as they were, to the bit, in both backends."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_module import fitting_module
from small_runs import small_bank

from benchmarks.added_branch import load_with_branch, save_branch
from benchmarks.hybrid import hybrid_pipeline
from saferedir.engines.errors import RequestError, TrainingError
from saferedir.runtime import Pipeline, SafetyPolicy
from saferedir_torch.detector import Step
from saferedir_torch.learner import Learner
from saferedir_torch.models import SHIPPED_SAFETY
from saferedir_torch.new_module import extended_module
from saferedir_torch.pairs import PairBank
from saferedir_torch.safety_module import SafetyModule, parameters_sha256
from saferedir_torch.trajectories import encode
from saferedir_torch.world.source import AddedPrompts, WorldPrompts
from saferedir_torch.world.split import load_split

PROMPTS = ["a church next to a cat", "a dog in ink style", "a teddy bear", "a castle"]


@pytest.fixture(scope="module")
def base(eager: Any) -> SafetyModule:
    return fitting_module(eager)


@pytest.fixture(scope="module")
def extended(eager: Any, base: SafetyModule) -> SafetyModule:
    torch.manual_seed(0)
    return extended_module(base, eager, AddedPrompts("teddy", base.config.concept_names, load_split()), 0).eval()


def test_an_added_branch_is_kept_without_the_module_under_it(
    base: SafetyModule, extended: SafetyModule, tmp_path: Path
) -> None:
    extended.save(tmp_path / "whole")  # rounds, as training does
    whole = SafetyModule.load(tmp_path / "whole")
    save_branch(base, whole, tmp_path / "branch")
    again = load_with_branch(base, tmp_path / "branch")
    assert parameters_sha256(again) == parameters_sha256(whole)
    assert all(torch.equal(tensor, whole.state_dict()[name]) for name, tensor in again.state_dict().items())
    kept = (tmp_path / "branch" / "model.safetensors").stat().st_size
    assert kept < 0.5 * (tmp_path / "whole" / "model.safetensors").stat().st_size
    with torch.no_grad():
        whole.branches[0].detector.head.bias += 1
    with pytest.raises(RequestError, match="not the shipped one with a branch more"):
        save_branch(base, whole, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_only_the_new_branch_learns(base: SafetyModule, extended: SafetyModule) -> None:
    new = f"branches.{len(base.branches)}."
    for name, parameter in extended.named_parameters():
        assert parameter.requires_grad == name.startswith(new)
    for name, tensor in base.state_dict().items():
        assert torch.equal(extended.state_dict()[name], tensor)
    assert extended.config.promise is None


def test_benign_prompts_of_an_added_concept_never_ask_for_it() -> None:
    split = load_split()
    source, rng = AddedPrompts("teddy", ["church", "ink", "weapons"], split), np.random.default_rng(3)
    prompts = [source.benign(rng) for _ in range(3000)]
    denied = re.compile(r"(?:,? but not|, no| and no| without) (?:a )?(?:teddy bear|plush toy)")
    assert split.names["teddy"] == ["a teddy bear", "a plush toy"]
    assert [prompt for prompt in prompts if re.search("teddy|plush", denied.sub("", prompt))] == []
    assert sum(any(name in prompt for name in split.names["church"]) for prompt in prompts) > 100


def test_what_a_latent_shows_of_an_added_concept_is_left_open(base: SafetyModule, extended: SafetyModule) -> None:
    """The encoder was taught without it."""
    shown = torch.arange(40)[:, None].remainder(3) - 1.0
    bank = small_bank(20, 2, ["teddy"], shown=shown, prompts=torch.randn(21, 77, 128).half())
    embeds = torch.randn(40, 77, 128).half()
    words = torch.ones(40, 77, dtype=torch.bool)
    pairs = PairBank(embeds, embeds, torch.ones(40, 1), torch.ones(40, 1), words)
    added = Learner(extended, bank, pairs, 0).bank
    assert torch.equal(added.shown, torch.where(shown > 0, -1.0, shown))
    assert torch.equal(bank.shown, shown)  # the runs are as they were recorded
    assert torch.equal(Learner(base, bank, pairs, 0).bank.shown, shown)


@torch.no_grad()
def test_scores_and_redirections_of_the_others_are_bit_identical(base: SafetyModule, extended: SafetyModule) -> None:
    old = len(base.config.concepts)
    generator = torch.Generator().manual_seed(1)
    step = Step(*torch.randn(2, 5, 4, 16, 16, generator=generator), torch.rand(5, generator=generator))
    prompt, known = torch.randn(5, 77, 128, generator=generator), torch.tensor([True, True, False, True, False])
    scored = base.score(base.features(step), known, [prompt], [prompt], [prompt])
    more = extended.score(extended.features(step), known, [prompt], [prompt], [prompt])
    assert torch.equal(scored.statistic, more.statistic[:, :old])
    assert more.statistic.shape == (5, old + 1)
    active = torch.zeros(5, old + 1, dtype=torch.bool)
    active[:3, 0] = True
    again = torch.zeros_like(active)
    again[1, 0] = True
    before = base.redirect(scored, [prompt], active[:, :old], again[:, :old])
    after = extended.redirect(more, [prompt], active, again)
    assert torch.equal(before.streams[0][:3], after.streams[0][:3])
    assert torch.equal(before.token_mask, after.token_mask[:, :old])
    assert torch.equal(after.streams[0][3:], prompt[3:])
    assert not after.token_mask[:, old:].any()
    active[:, old] = True
    both = extended.redirect(more, [prompt], active, again).streams[0]
    assert not torch.equal(both[:3], before.streams[0][:3])
    again[3, old] = True
    fallen = extended.redirect(more, [prompt], active, again).streams[0]
    assert torch.equal(fallen[3], extended.last_branch.fallback[0][0])


def test_pictures_of_the_others_are_bit_identical(base: SafetyModule, extended: SafetyModule) -> None:
    policy = SafetyPolicy(enabled=tuple(base.config.concept_names))
    before = hybrid_pipeline(base)(PROMPTS, seed=3, num_inference_steps=6)
    after = hybrid_pipeline(extended, policy=policy)(PROMPTS, seed=3, num_inference_steps=6)
    for first, second in zip(before.images, after.images, strict=True):
        assert first.tobytes() == second.tobytes()
    for first, second in zip(before.records, after.records, strict=True):
        assert [step.fired for step in first.steps] == [step.fired for step in second.steps]


def test_a_known_concept_cannot_be_added(eager: Any, base: SafetyModule) -> None:
    with pytest.raises(TrainingError, match="church already"):
        extended_module(base, eager, WorldPrompts(["church"], load_split()), 0)


def test_an_added_concept_has_a_fallback_of_its_own(eager: Any, base: SafetyModule, extended: SafetyModule) -> None:
    first, added = extended.each_branch()
    assert torch.equal(first.fallback[0], base.last_branch.fallback[0])
    torch.testing.assert_close(added.fallback[0], encode(eager, ["a gift, cute"])[1])
    assert added.keeps_subject.tolist() == [0]


def test_the_hybrid_backend_draws_what_the_deployed_engine_draws(pipeline: Pipeline) -> None:
    deployed = pipeline(PROMPTS, seed=3, num_inference_steps=6)
    hybrid = hybrid_pipeline(SafetyModule.load(SHIPPED_SAFETY))(PROMPTS, seed=3, num_inference_steps=6)
    for first, second in zip(deployed.images, hybrid.images, strict=True):
        assert np.abs(np.asarray(first, int) - np.asarray(second, int)).max() <= 1
