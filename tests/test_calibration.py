"""Thresholds that promise: the bound by hand, the promise on simulated pictures, and recordings that resume."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom

from saferedir_torch.calibration import CalibrationError, allowed_exceedances, bound, calibrate, highest_logits
from saferedir_torch.models import SHIPPED_SAFETY, load_pipeline
from saferedir_torch.recording import RecordingError, record
from saferedir_torch.safety_module import SafetyModule

PROMPTS = ["a cat", "a dog on blue", "a house"]


def test_how_many_may_fire() -> None:
    assert allowed_exceedances(3000) == 0
    assert allowed_exceedances(2995) == 0
    assert allowed_exceedances(4742) == 0 + 1
    with pytest.raises(CalibrationError, match="at least 2995"):
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
    with pytest.raises(RecordingError, match="other prompts"):
        record(pipeline, PROMPTS, [1, 2, 4], steps=2, guidance_scale=5.0, folder=tmp_path, chunk=2)
    data = (tmp_path / "runs-000000.safetensors").read_bytes()
    (tmp_path / "runs-000000.safetensors").write_bytes(data[:500])
    with pytest.raises(RecordingError, match=r"runs-000000\.safetensors"):
        record(pipeline, PROMPTS, [1, 2, 3], steps=2, guidance_scale=5.0, folder=tmp_path, chunk=2)


def test_too_few_runs_carry_no_promise(tmp_path: Path) -> None:
    pipeline, module = load_pipeline(), SafetyModule.load(SHIPPED_SAFETY)
    runs = record(pipeline, PROMPTS, [1, 2, 3], steps=3, guidance_scale=5.0, folder=tmp_path)
    assert highest_logits(module, runs).shape == (3, len(module.config.concepts))
    with pytest.raises(CalibrationError):
        calibrate(module, runs, steps=3, guidance_scale=5.0, prompts="three")
