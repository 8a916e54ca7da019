"""A concept added to a finished module leaves the others as they were, to the bit, in both backends."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.added_branch import load_with_branch, save_branch
from benchmarks.hybrid import hybrid_pipeline
from saferedir.engines.errors import RequestError, TrainingError
from saferedir.runtime import Pipeline, SafetyPolicy
from saferedir_torch.learner import Learner
from saferedir_torch.models import SHIPPED_SAFETY
from saferedir_torch.new_module import extended_module
from saferedir_torch.safety_module import SafetyModule, parameters_sha256
from saferedir_torch.training_data import LatentBank, PairBank
from saferedir_torch.world.source import AddedPrompts
from saferedir_torch.world.split import load_split

#: Of the added concept, of tokens [1, T, D].
REFUGE = torch.zeros(1, 77, 128)
PROMPTS = ["a church next to a cat", "a dog in ink style", "a teddy bear", "a castle"]


@pytest.fixture(scope="module")
def base() -> SafetyModule:
    return SafetyModule.load(SHIPPED_SAFETY)


@pytest.fixture(scope="module")
def extended(base: SafetyModule) -> SafetyModule:
    torch.manual_seed(0)
    return extended_module(base, {"teddy": "gift"}, refuge=REFUGE).eval()


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
        whole.branches[0].detector.heads.bias += 1
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
    bank = LatentBank(
        concepts=("teddy",), latent=torch.randn(40, 4, 16, 16).half(), denoised=torch.zeros(40, 4, 16, 16).half(),
        timestep=torch.full((40,), 100.0),
        prompt=torch.arange(40), prompts=torch.randn(40, 77, 128).half(), asked=torch.zeros(40, 1),
        shown=torch.arange(40)[:, None].remainder(2).float(), run=torch.arange(40),
    )  # fmt: skip
    embeds = torch.randn(40, 77, 128).half()
    pairs = PairBank(embeds, embeds, torch.ones(40, 1), torch.ones(40, 1), torch.ones(40, 77).bool())
    alphas = torch.linspace(0.999, 0.01, 1000)
    batch = Learner(extended, bank, pairs, alphas, 0).detection_batch(0)
    by_prompt = batch.labels > 0
    assert by_prompt.any()
    assert (batch.weights[by_prompt] == 1).all()
    assert (batch.weights == 0).any()  # shown, and not asked for
    assert bank.shown.max() == 1  # the runs are as they were recorded
    whole = Learner(base, dataclasses.replace(bank, asked=torch.zeros(40, 3), shown=bank.shown.expand(-1, 3)),
                    dataclasses.replace(pairs, asked=torch.ones(40, 3), replaced=torch.ones(40, 3)), alphas, 0)  # fmt: skip
    assert (whole.detection_batch(0).labels.sum() > batch.labels.sum() * 3).item()


@torch.no_grad()
def test_scores_and_redirections_of_the_others_are_bit_identical(base: SafetyModule, extended: SafetyModule) -> None:
    old = len(base.config.concepts)
    generator = torch.Generator().manual_seed(1)
    latent, prompt = torch.randn(5, 4, 16, 16, generator=generator), torch.randn(5, 77, 128, generator=generator)
    timestep = torch.full((5,), 321.0)
    score, _, joint = base.score(latent, timestep, prompt)
    more, _, same_joint = extended.score(latent, timestep, prompt)
    assert torch.equal(score, more[:, :old])
    assert torch.equal(joint, same_joint)
    active = torch.zeros(5, old + 1, dtype=torch.bool)
    active[:3, 0] = True
    strength, again = torch.full((5, old + 1), 1.5), torch.zeros_like(active)
    again[1, 0] = True
    before = base.redirect(prompt, joint, active[:, :old], strength[:, :old], again[:, :old])
    after = extended.redirect(prompt, joint, active, strength, again)
    assert torch.equal(before.prompt[:3], after.prompt[:3])
    assert torch.equal(after.prompt[3:], prompt[3:])
    assert not after.token_mask[:, old:].any()
    active[:, old] = True
    assert not torch.equal(extended.redirect(prompt, joint, active, strength, again).prompt[:3], before.prompt[:3])


def test_pictures_of_the_others_are_bit_identical(base: SafetyModule, extended: SafetyModule) -> None:
    policy = SafetyPolicy(enabled=tuple(base.config.concept_names))
    before = hybrid_pipeline(base)(PROMPTS, seed=3, num_inference_steps=6)
    after = hybrid_pipeline(extended, policy=policy)(PROMPTS, seed=3, num_inference_steps=6)
    for first, second in zip(before.images, after.images, strict=True):
        assert first.tobytes() == second.tobytes()
    for first, second in zip(before.records, after.records, strict=True):
        assert [step.fired for step in first.steps] == [step.fired for step in second.steps]


def test_a_known_concept_cannot_be_added(base: SafetyModule) -> None:
    with pytest.raises(TrainingError, match="church already"):
        extended_module(base, {"church": "house"}, refuge=REFUGE)


def test_the_hybrid_backend_draws_what_the_deployed_engine_draws(base: SafetyModule, pipeline: Pipeline) -> None:
    deployed = pipeline(PROMPTS, seed=3, num_inference_steps=6)
    hybrid = hybrid_pipeline(base)(PROMPTS, seed=3, num_inference_steps=6)
    for first, second in zip(deployed.images, hybrid.images, strict=True):
        assert np.abs(np.asarray(first, int) - np.asarray(second, int)).max() <= 1
