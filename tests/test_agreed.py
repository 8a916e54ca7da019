"""What all inputs and a step's look alone say together: evidence of two sources adds up, above a level of its own."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from msgspec import structs
from safetensors.torch import load_file, save_file
from small_module import TOKENS, WIDTH, small_module

from saferedir_torch.calibration import (
    AGREED_MARGIN,
    allowed_beside,
    allowed_exceedances,
    highest_logits,
    logit_of,
    rate_beside,
    set_agreed_levels,
)
from saferedir_torch.models import SHIPPED_SAFETY
from saferedir_torch.recording import RecordedRuns
from saferedir_torch.safety_module import HIGHEST, WEIGHTS_FILE, SafetyModule


@torch.no_grad()
def test_where_neither_says_enough_both_may() -> None:
    module, timestep = small_module(alone=True), torch.full((6,), 400.0)
    branch, prompt, latent = module.last_branch, torch.randn(6, TOKENS, WIDTH), torch.randn(6, 4, 16, 16)
    features = module.features(latent, timestep)
    assert features.shown is not None
    of_all = branch.comparable(branch.logits(features.joint, prompt), timestep)
    shown = branch.comparable_alone(features.shown, timestep)
    branch.agreed_levels.copy_(torch.minimum(of_all, shown).mean(dim=0))
    evidence, together = branch.evidence(features, prompt, timestep)
    torch.testing.assert_close(evidence, torch.stack([of_all, shown, of_all + shown - branch.agreed_levels]).amax(dim=0))
    torch.testing.assert_close(together, of_all)
    assert (evidence > torch.maximum(of_all, shown)).any()
    noise = torch.full((6,), 960.0)
    of_noise, alone = branch.logits(features.joint, prompt), branch.comparable_alone(features.shown, noise)
    first, _ = branch.evidence(features, prompt, noise)
    torch.testing.assert_close(first, torch.maximum(branch.comparable(of_noise, noise), alone))
    branch.agreed_levels.fill_(HIGHEST)
    assert torch.equal(branch.evidence(features, prompt, timestep)[0], torch.where(shown > of_all, shown, of_all))


def runs_of(count: int) -> RecordedRuns:
    """Noise for pictures, which is all the same to levels."""
    generator = torch.Generator().manual_seed(3)
    latent = torch.randn(count, 4, 4, 16, 16, generator=generator).half()
    prompt = torch.randn(count, TOKENS, WIDTH, generator=generator).half()
    return RecordedRuns(latent, torch.zeros_like(latent), torch.tensor([900.0, 600.0, 300.0, 50.0]), prompt)


def test_nothing_benign_fires_by_both_that_does_not_by_one() -> None:
    module, runs = small_module(alone=True), runs_of(60)
    alone = highest_logits(module, runs)
    bounds = torch.quantile(torch.from_numpy(alone), 0.9, dim=0)  # some fire as it is
    concepts = zip(module.config.concepts, bounds, strict=True)
    named = tuple(structs.replace(one, threshold=float(torch.sigmoid(at))) for one, at in concepts)
    module.config = structs.replace(module.config, concepts=named)
    thresholds = torch.tensor([logit_of(one.threshold) for one in named])
    firing = (torch.from_numpy(alone) >= thresholds).any(dim=1)
    assert set_agreed_levels(module, runs) == int(firing.sum()) > 0
    after = torch.from_numpy(highest_logits(module, runs))
    assert torch.equal((after >= thresholds).any(dim=1), firing)
    branch = module.last_branch
    branch.agreed_levels.sub_(2 * AGREED_MARGIN)  # no higher than they must be
    lowered = torch.from_numpy(highest_logits(module, runs))[~firing]
    assert ((lowered >= thresholds).any(dim=0) | (branch.agreed_levels > HIGHEST / 2)).all()


@pytest.mark.parametrize("spoilt", [0, 1])
def test_what_is_promised_beside_levels_holds(spoilt: int) -> None:
    """Of uniform numbers it is known how many pass: one threshold for the first, a level of its own for each of the others."""
    pictures, levels, rng = 200, 3, np.random.default_rng(5)
    promised = rate_beside(spoilt, levels, pictures)
    broken = 0
    for _ in range(2000):
        drawn = rng.random((pictures, 1 + levels))
        threshold = np.sort(drawn[:, 0])[-1 - spoilt]
        highest = drawn[drawn[:, 0] <= threshold, 1:].max(axis=0)
        broken += 1 - threshold * highest.prod() > promised
    assert 0.03 < broken / 2000 < 0.065  # 5 % of trials, by a margin of three deviations


def test_as_many_may_fire_as_the_promise_holds_with() -> None:
    assert allowed_beside(3, 7751, 0.001) is None
    assert allowed_beside(3, 7752, 0.001) == allowed_beside(3, 9150, 0.001) == 0
    assert allowed_beside(3, 9151, 0.001) == 1
    assert allowed_beside(0, 4742, 0.001) == allowed_exceedances(4742) == 1
    assert rate_beside(1, 0, 10511) <= 0.000455


def test_a_module_calibrated_without_decides_as_it_did(tmp_path: Path) -> None:
    shutil.copytree(SHIPPED_SAFETY, tmp_path / "older")
    tensors = load_file(tmp_path / "older" / WEIGHTS_FILE)
    save_file({name: value for name, value in tensors.items() if "agreed" not in name}, tmp_path / "older" / WEIGHTS_FILE)
    assert (SafetyModule.load(tmp_path / "older").last_branch.agreed_levels == HIGHEST).all()
