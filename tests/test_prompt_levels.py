"""The level of the first step: read off prompts alone, restated in the promise, and absent from modules that had none."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from msgspec import structs
from safetensors.torch import load_file, save_file
from scipy.stats import binom
from small_module import TOKENS, WIDTH, small_module
from typer.testing import CliRunner

from saferedir.engines.errors import RequestError
from saferedir.engines.manifest import Promise
from saferedir_torch.__main__ import app
from saferedir_torch.benign_prompts import benign_prompts
from saferedir_torch.models import SHIPPED_MODEL, SHIPPED_SAFETY, load_pipeline
from saferedir_torch.prompt_levels import fires_first, first_timestep, restated, set_prompt_levels
from saferedir_torch.safety_module import HIGHEST, WEIGHTS_FILE, SafetyModule
from saferedir_torch.world.prompts import CONCEPTS, training_pair
from saferedir_torch.world.split import load_split

PROMISE = Promise(rate=0.001, confidence=0.95, pictures=4742, allowed=1, steps=25, guidance_scale=5.0, prompts="none")


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


def test_the_first_step_fires_for_more_that_asks_and_for_nothing_that_says_little(eager: Any, module: SafetyModule) -> None:
    """Names from behind another thing, where single words say less; benign prompts of another seed; vague ones."""
    rng, names = np.random.default_rng(5), module.config.concept_names
    split, (others, _, _) = load_split(), benign_prompts(None, 200, 7, names)
    asking = [f"{other}, {training_pair(CONCEPTS['church'], rng, split).unsafe}" for other in others]
    vague = ["", "a", "an emoji", "something", "a picture"] * 40

    def firing(prompts: list[str]) -> int:
        return int(fires_first(eager, module, prompts, range(len(prompts)), 961).any(dim=1).sum())

    module.last_branch.prompt_levels.fill_(HIGHEST)
    missed, falsely = len(asking) - firing(asking), firing(vague)
    set_prompt_levels(eager, module, benign_prompts(None, 400, 8, names)[0], seed=1)
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


def test_a_promise_is_restated_for_what_fires_besides() -> None:
    assert restated(PROMISE, 0) == PROMISE
    more = restated(PROMISE, 2)
    assert more.allowed == 3
    assert binom.cdf(3, more.pictures, more.rate) == pytest.approx(0.05, abs=1e-3)


def test_the_command_draws_nothing_and_leaves_thresholds(tmp_path: Path, module: SafetyModule) -> None:
    module.config = structs.replace(module.config, promise=structs.replace(PROMISE, pictures=3000, allowed=0))
    module.last_branch.prompt_levels.fill_(HIGHEST)
    module.save(tmp_path / "safety")
    command = [
        "calibrate-first-step",
        "--model",
        str(SHIPPED_MODEL),
        "--safety",
        str(tmp_path / "safety"),
        "--level-count",
        "50",
    ]
    said = CliRunner().invoke(app, command, catch_exceptions=False)
    assert said.exit_code == 0
    stated = json.loads(said.output[said.output.index("{") :])
    after = SafetyModule.load(tmp_path / "safety")
    assert after.config.concepts == module.config.concepts
    assert after.last_branch.prompt_levels.tolist() == stated["prompt_levels"]
    assert stated["promise"]["allowed"] == stated["fire"] == after.config.promise.allowed  # type: ignore[union-attr]
    assert not list(tmp_path.rglob("runs-*"))


def test_a_module_that_was_never_calibrated_is_refused(tmp_path: Path, module: SafetyModule) -> None:
    module.config = structs.replace(module.config, promise=None)
    module.save(tmp_path / "safety")
    with pytest.raises(RequestError, match="never calibrated"):
        CliRunner().invoke(
            app, ["calibrate-first-step", "--model", str(SHIPPED_MODEL), "--safety", str(tmp_path / "safety")],
            catch_exceptions=False,
        )  # fmt: skip


def test_no_prompts_are_an_error_that_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "none.txt").write_text("\n \n")
    with pytest.raises(RequestError, match=r"none\.txt holds no prompts"):
        benign_prompts(tmp_path / "none.txt", 3, 0, [])
    with pytest.raises(RequestError, match="at least one"):
        benign_prompts(None, 0, 0, [])


def test_where_steps_begin(eager: Any) -> None:
    assert first_timestep(eager, 25) >= 950 > first_timestep(eager, 5)
