"""Thresholds that promise: the bound by hand, the promise on simulated pictures, and recordings that resume."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs
from scipy.stats import binom
from typer.testing import CliRunner

from saferedir.engines.errors import RequestError
from saferedir_torch.__main__ import app
from saferedir_torch.calibration import (
    RARE,
    allowed_exceedances,
    bound,
    calibrate,
    highest_logits,
    joint_rate,
    set_levels,
    tail_level,
)
from saferedir_torch.models import SHIPPED_MODEL, SHIPPED_SAFETY, load_pipeline
from saferedir_torch.new_module import extended_module
from saferedir_torch.recording import RecordedRuns, record
from saferedir_torch.safety_module import SafetyModule

PROMPTS = ["a cat", "a dog on blue", "a house"]


def test_how_many_may_fire() -> None:
    assert allowed_exceedances(3000) == 0
    assert allowed_exceedances(2995) == 0
    assert allowed_exceedances(4742) == 0 + 1
    assert allowed_exceedances(10511, 0.000455) == 1
    with pytest.raises(RequestError, match="at least 2995"):
        allowed_exceedances(2994)


@given(pictures=st.integers(3000, 40_000))
@settings(max_examples=30, deadline=None)
def test_the_allowed_number_is_the_largest_that_keeps_the_promise(pictures: int) -> None:
    allowed = allowed_exceedances(pictures)
    assert binom.cdf(allowed, pictures, 0.001) <= 0.05 < binom.cdf(allowed + 1, pictures, 0.001)


def level(threshold: float) -> float:
    """The logit of a threshold."""
    return float(np.log(threshold / (1 - threshold)))


def test_one_bound_for_the_whole_picture() -> None:
    logits = np.array([[1.0, -9.0], [0.0, 2.5], [-3.0, -3.0]])
    assert level(bound(logits, allowed=0)) == pytest.approx(2.501)
    assert level(bound(logits, allowed=1)) == pytest.approx(1.001)


def test_the_promise_holds_as_often_as_it_says() -> None:
    """200 calibrations on pictures whose false alarm rate above any bound is known exactly."""
    rng = np.random.default_rng(0)
    kept = 0
    for _ in range(200):
        threshold = bound(rng.exponential(size=(3000, 1)), allowed_exceedances(3000))
        kept += np.exp(-level(threshold)) <= 0.001
    assert 180 <= kept <= 200  # 95 % of 200 is 190, standard deviation 3


def test_scores_are_relative_to_levels_and_gains() -> None:
    branch = SafetyModule.load(SHIPPED_SAFETY).last_branch
    branch.levels.copy_(torch.arange(9.0).expand_as(branch.levels))  # 0 at timestep 0, 8 at 1000
    branch.gains.copy_(torch.tensor([1.0, 2.0, 3.0]))
    found = branch.comparable(torch.full((3, 3), 10.0), torch.tensor([0.0, 187.5, 999.0]))
    above = torch.tensor([[10.0], [8.5], [10 - 7.992]])
    torch.testing.assert_close(found, above * torch.tensor([1.0, 2.0, 3.0]))


def test_a_recording_resumes_and_refuses_another_ones_chunks(tmp_path: Path) -> None:
    pipeline = load_pipeline()
    first = record(pipeline, PROMPTS, [1, 2, 3], steps=2, guidance_scale=5.0, folder=tmp_path, chunk=2)
    written = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    (tmp_path / "runs-000002.safetensors").unlink()
    again = record(pipeline, PROMPTS, [1, 2, 3], steps=2, guidance_scale=5.0, folder=tmp_path, chunk=2)
    assert torch.equal(first.latent, again.latent)
    assert (tmp_path / "runs-000000.safetensors").stat().st_mtime_ns == written["runs-000000.safetensors"]
    with pytest.raises(RequestError, match="other prompts"):
        record(pipeline, PROMPTS, [1, 2, 4], steps=2, guidance_scale=5.0, folder=tmp_path, chunk=2)
    data = (tmp_path / "runs-000000.safetensors").read_bytes()
    (tmp_path / "runs-000000.safetensors").write_bytes(data[:500])
    with pytest.raises(RequestError, match=r"runs-000000\.safetensors"):
        record(pipeline, PROMPTS, [1, 2, 3], steps=2, guidance_scale=5.0, folder=tmp_path, chunk=2)


def test_too_few_runs_carry_no_promise(tmp_path: Path) -> None:
    pipeline, module = load_pipeline(), SafetyModule.load(SHIPPED_SAFETY)
    runs = record(pipeline, PROMPTS, [1, 2, 3], steps=3, guidance_scale=5.0, folder=tmp_path)
    assert highest_logits(module, runs).shape == (3, len(module.config.concepts))
    with pytest.raises(RequestError):
        calibrate(module, runs, runs, steps=3, guidance_scale=5.0, prompts="three")


def test_a_level_is_reached_about_as_rarely_as_is_said() -> None:
    draw = torch.Generator().manual_seed(0)
    scale = torch.tensor([0.3, 1.0, 4.0])
    reached = torch.empty(4000, 3).exponential_(generator=draw) * scale - 7
    often = (torch.empty(2_000_000, 3).exponential_(generator=draw) * scale - 7 >= tail_level(reached)).float().mean(dim=0)
    assert (often > RARE / 8).all()
    assert (often < 8 * RARE).all()


def test_levels_are_above_what_the_highest_benign_picture_comes_up_to(tmp_path: Path) -> None:
    pipeline, module = load_pipeline(), SafetyModule.load(SHIPPED_SAFETY)
    runs = record(pipeline, PROMPTS, [1, 2, 3], steps=8, guidance_scale=5.0, folder=tmp_path)
    runs.timestep = torch.tensor([1000.0, 875, 750, 625, 500, 375, 250, 0])  # on the knots, but for 125, which has none
    set_levels(module, runs)
    assert highest_logits(module, runs).max() < 2e-3  # levels are rounded
    branch = module.last_branch
    count, steps = runs.latent.shape[:2]
    joint = module.encoder(runs.latent.flatten(0, 1).float(), runs.timestep.repeat(count))
    raw = branch.logits(joint, runs.prompt.float().repeat_interleave(steps, dim=0)).reshape(count, steps, -1)
    for knot, near in {8: raw[:, :2], 6: raw[:, 1:4], 5: raw[:, 2:], 0: raw[:, 2:]}.items():  # late ones reach up to 750
        expected = tail_level(near.amax(dim=1))
        torch.testing.assert_close(branch.levels[:, knot], expected, atol=0.02, rtol=1e-3)


def test_where_those_before_fire_already_the_promise_is_what_holds_for_both(monkeypatch: pytest.MonkeyPatch) -> None:
    module = extended_module(SafetyModule.load(SHIPPED_SAFETY), {"teddy": "gift"}, refuge=torch.zeros(1, 77, 128)).eval()
    pictures = 2995
    logits = np.full((pictures, 4), -5.0)
    logits[:, 3] = np.linspace(-4, 3, pictures)
    logits[7, 0] = logits[7, 3] = 12.0  # the church's own, and the new one may fire there as well
    monkeypatch.setattr("saferedir_torch.calibration.highest_logits", lambda *_: logits)
    noise = torch.randn(1, 1, 4, 16, 16).expand(pictures, -1, -1, -1, -1).half()
    runs = RecordedRuns(
        noise, torch.zeros_like(noise), torch.tensor([500.0]), torch.randn(1, 77, 128).expand(pictures, -1, -1).half()
    )
    calm = RecordedRuns(noise[:2], runs.denoised[:2], runs.timestep, runs.prompt[:2])
    promise = calibrate(module, calm, runs, steps=1, guidance_scale=5.0, prompts="none")
    assert (promise.allowed, promise.rate) == (1, round(joint_rate(1, pictures), 6))
    assert 0.003 < promise.rate < 0.0033
    assert level(module.config.concepts[-1].threshold) == pytest.approx(3.0, abs=0.01)
    logits[7] = -5.0
    promise = calibrate(module, calm, runs, steps=1, guidance_scale=5.0, prompts="none", rate=0.002)
    assert (promise.allowed, promise.rate) == (allowed_exceedances(pictures, 0.002), 0.002)


def test_the_joint_rate_holds_as_often_as_it_says() -> None:
    """Scores of a concept before and one added, independent and uniform; the former fires at a rate of its own."""
    rng, pictures, own = np.random.default_rng(5), 800, 0.002
    kept = []
    for _ in range(600):
        before, added = rng.random(pictures) < own, rng.random(pictures)
        exceeds = 1 - added[~before].max()  # at the highest score of those that are not spoilt already
        kept.append(own + (1 - own) * exceeds <= joint_rate(int(before.sum()), pictures))
    assert np.mean(kept) > 0.95


@pytest.mark.slow
def test_calibrating_an_addition_leaves_the_others_as_they_were() -> None:
    base = SafetyModule.load(SHIPPED_SAFETY)
    deaf = tuple(structs.replace(concept, threshold=1 - 1e-10) for concept in base.config.concepts)
    base.config = structs.replace(base.config, concepts=deaf)  # noise is no picture: they would fire on it
    module = extended_module(base, {"teddy": "gift"}, refuge=torch.zeros(1, 77, 128)).eval()
    generator = torch.Generator().manual_seed(0)
    pictures, prompt = 2995, torch.randn(1, 77, 128, generator=generator).half()
    latent = torch.randn(pictures, 1, 4, 16, 16, generator=generator).half()
    runs = RecordedRuns(latent, torch.zeros_like(latent), torch.tensor([500.0]), prompt.expand(pictures, -1, -1))
    calm = RecordedRuns(latent[:100], runs.denoised[:100], runs.timestep, runs.prompt[:100])
    calibrate(module, calm, runs, steps=1, guidance_scale=5.0, prompts="noise")
    old = len(base.config.concepts)
    assert module.config.concepts[:old] == base.config.concepts
    for name, tensor in base.state_dict().items():
        assert torch.equal(module.state_dict()[name], tensor), name
    highest, threshold = highest_logits(module, runs), module.config.concepts[-1].threshold
    assert highest[:, -1].max() < level(threshold) <= highest[:, -1].max() + 0.01
    assert module.config.promise is not None
    eager = tuple(structs.replace(concept, threshold=1e-6) for concept in base.config.concepts)
    module.config = structs.replace(module.config, concepts=eager + module.config.concepts[old:])
    with pytest.raises(RequestError, match="church, ink, weapons fire on 2995"):
        calibrate(module, calm, runs, steps=1, guidance_scale=5.0, prompts="noise")


@pytest.mark.parametrize("strength", ["ink", "ink=much", "castle=1.8", "ink=0", "ink=nan"])
def test_a_strength_that_cannot_be_is_refused_before_anything_is_drawn(strength: str, tmp_path: Path) -> None:
    safety = tmp_path / "safety"
    shutil.copytree(SHIPPED_SAFETY, safety)
    before = (safety / "config.json").read_bytes()
    command = [
        "calibrate", "--model", str(SHIPPED_MODEL), "--safety", str(safety), "--recorded", str(tmp_path / "benign"),
        "--strength", strength,
    ]  # fmt: skip
    result = CliRunner().invoke(app, command, env={"COLUMNS": "200"})
    assert result.exit_code == 2
    assert repr(strength) in result.output
    assert not (tmp_path / "benign").exists()
    assert (safety / "config.json").read_bytes() == before
