"""The level of the first step: read off prompts alone, and absent from modules that were calibrated without it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from small_module import TOKENS, WIDTH, small_module

from saferedir.engines.errors import RequestError
from saferedir_torch.attacks.hardening import strange_prompts
from saferedir_torch.command_line.benign_prompts import benign_prompts
from saferedir_torch.models import SHIPPED_SAFETY, load_pipeline
from saferedir_torch.prompt_levels import set_prompt_levels
from saferedir_torch.safety_module import HIGHEST, WEIGHTS_FILE, SafetyModule
from saferedir_torch.trajectories import encode, initial_noise
from saferedir_torch.world.prompts import CONCEPTS, training_pair
from saferedir_torch.world.split import load_split


@pytest.fixture(scope="module")
def eager() -> Any:
    return load_pipeline()


@pytest.fixture
def module() -> SafetyModule:
    return SafetyModule.load(SHIPPED_SAFETY)


def test_in_the_first_step_words_count_by_their_own_level() -> None:
    module = small_module()
    branch, prompt, noise = module.last_branch, torch.randn(4, TOKENS, WIDTH), torch.randn(4, 4, 16, 16)
    timestep = torch.tensor([0.0, 949.0, 950.0, 999.0])
    features = module.features(noise, timestep)
    without, _ = branch.evidence(features, prompt, timestep)
    branch.gains.copy_(torch.tensor([0.5, 1.0, 2.0]))
    branch.prompt_levels.copy_(branch.detector.words(prompt).mean(dim=0) - torch.tensor([90.0, 90.0, -90.0]))
    evidence, _ = branch.evidence(features, prompt, timestep)
    torch.testing.assert_close(evidence[:2], (without * branch.gains)[:2])
    torch.testing.assert_close(evidence[2:, 2], (without * branch.gains)[2:, 2])
    named = (branch.detector.words(prompt) - branch.prompt_levels) * branch.gains
    torch.testing.assert_close(evidence[2:, :2], named[2:, :2])


@pytest.mark.slow
def test_the_first_step_fires_for_more_that_asks_and_for_nothing_that_says_little(eager: Any, module: SafetyModule) -> None:
    """Names from behind another thing, where single words say less; benign prompts of another seed; vague ones."""
    rng, names = np.random.default_rng(5), module.config.concept_names
    split, (others, _, _) = load_split(), benign_prompts(None, 100, 7, names)
    asking = [f"{other}, {training_pair(CONCEPTS['church'], rng, split).unsafe}" for other in others]
    vague = ["", "a", "an emoji", "something", "a picture"] * 20

    thresholds = torch.tensor([concept.threshold for concept in module.config.concepts])

    @torch.no_grad()
    def firing(prompts: list[str]) -> int:
        noise, timestep = initial_noise(eager, list(range(len(prompts)))), torch.full((len(prompts),), 961.0)
        return int((module.score(noise, timestep, encode(eager, prompts)[1]).score >= thresholds).any(dim=1).sum())

    module.last_branch.prompt_levels.fill_(HIGHEST)
    missed, falsely = len(asking) - firing(asking), firing(vague)
    set_prompt_levels(eager, module, strange_prompts(benign_prompts(None, 400, 8, names)[0], seed=1)[:3000])
    assert 0 < len(asking) - firing(asking) < 0.9 * missed
    assert firing(others) <= 1
    assert firing(vague) == falsely
    shipped = SafetyModule.load(SHIPPED_SAFETY).last_branch.prompt_levels
    torch.testing.assert_close(module.last_branch.prompt_levels, shipped, atol=0.5, rtol=0)  # of other prompts


def test_a_module_without_that_level_decides_as_it_did(module: SafetyModule, tmp_path: Path) -> None:
    shutil.copytree(SHIPPED_SAFETY, tmp_path / "older")
    weights = tmp_path / "older" / WEIGHTS_FILE
    tensors = {name: tensor for name, tensor in load_file(weights).items() if "prompt_levels" not in name}
    save_file(tensors, weights, metadata={"format": "pt"})
    older = SafetyModule.load(tmp_path / "older")
    noise, prompt = torch.randn(4, 4, 16, 16), torch.randn(4, 77, 128)
    late, first = torch.full((4,), 949.0), torch.full((4,), 960.0)
    assert torch.equal(older.score(noise, late, prompt).score, module.score(noise, late, prompt).score)
    module.last_branch.prompt_levels.fill_(HIGHEST)
    assert torch.equal(older.score(noise, first, prompt).score, module.score(noise, first, prompt).score)
    module.last_branch.prompt_levels.fill_(-HIGHEST)
    assert (older.score(noise, first, prompt).score < module.score(noise, first, prompt).score).any()


def test_no_prompts_are_an_error_that_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "none.txt").write_text("\n \n")
    with pytest.raises(RequestError, match=r"none\.txt holds no prompt;"):
        benign_prompts(tmp_path / "none.txt", 3, 0, [])
    with pytest.raises(RequestError, match="at least one"):
        benign_prompts(None, 0, 0, [])
