"""The carried estimate: what a scheduler's noise levels make of a prediction, and who is refused for telling none."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from small_module import fitting_module

from saferedir.engines.errors import SafetyMismatchError
from saferedir_torch.estimate import NoiseLevels
from saferedir_torch.fit import check_match
from saferedir_torch.models import load_pipeline

SHAPE = (6, 4, 8, 8)


def randoms(seed: int) -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("timestep", [0, 1, 499, 999])
def test_a_perfect_prediction_tells_the_picture(prediction: str, timestep: int) -> None:
    scheduler: Any = DDPMScheduler(prediction_type=prediction, clip_sample=False)
    picture, noise, time = randoms(0), randoms(1), torch.tensor([timestep] * 6)
    seen = scheduler.add_noise(picture, noise, time)
    predicted = {"epsilon": noise, "v_prediction": scheduler.get_velocity(picture, noise, time), "sample": picture}[prediction]
    torch.testing.assert_close(NoiseLevels(scheduler).denoised(seen, timestep, predicted), picture, atol=1e-4, rtol=1e-4)


@settings(deadline=None, max_examples=50)
@given(times=st.lists(st.floats(0, 999), min_size=2, max_size=8), zero_snr=st.booleans())
def test_levels_are_of_variance_1_and_noisier_the_later_in_training(times: list[float], zero_snr: bool) -> None:
    levels = NoiseLevels(DDIMScheduler(rescale_betas_zero_snr=zero_snr))
    found = [levels.at(time) for time in sorted(times)]
    assert all(level.alpha**2 + level.sigma**2 == pytest.approx(1) for level in found)
    shares = [level.share for level in found]
    assert all(later >= earlier - 1e-12 for earlier, later in pairwise(shares))  # times may lie closer than rounding
    assert all(0 < share <= 1 for share in shares)


def test_at_zero_signal_velocity_tells_the_picture_and_noise_nothing() -> None:
    picture, noise = randoms(0), randoms(1)
    for prediction, predicted, told in (("v_prediction", -picture, picture), ("epsilon", noise, torch.full(SHAPE, torch.inf))):
        levels = NoiseLevels(DDIMScheduler(prediction_type=prediction, rescale_betas_zero_snr=True))
        assert levels.at(999) == (0, 1)
        assert levels.at(999).share == 1
        assert torch.equal(levels.denoised(noise, 999, predicted), told)


def test_levels_between_timesteps_are_those_that_karras_spacing_asks_for() -> None:
    scheduler: Any = EulerDiscreteScheduler(use_karras_sigmas=True)
    scheduler.set_timesteps(12)
    levels = NoiseLevels(scheduler)
    assert any(float(timestep) % 1 for timestep in scheduler.timesteps)
    for timestep, sigma in zip(scheduler.timesteps, scheduler.sigmas, strict=False):
        level = levels.at(float(timestep))
        assert level.sigma / level.alpha == pytest.approx(float(sigma), rel=1e-3)
        assert level.alpha**2 + level.sigma**2 == pytest.approx(1)
        assert level.share == pytest.approx(float(sigma / (1 + sigma)), rel=1e-3)


def test_levels_beyond_the_ends_are_those_of_the_ends() -> None:
    levels = NoiseLevels(DDIMScheduler())
    assert levels.at(-1) == levels.at(0)
    assert levels.at(1000) == levels.at(999)


class Unknown:
    """A sampler of somebody's own."""


@pytest.mark.parametrize(
    ("scheduler", "said"),
    [
        (FlowMatchEulerDiscreteScheduler(), "noise level: FlowMatchEulerDiscreteScheduler states no alphas_cumprod"),
        (Unknown(), "noise level: Unknown states no alphas_cumprod, .*; expected one that states them, such as DDIMScheduler"),
        (EDMEulerScheduler(), "noise level: EDMEulerScheduler states no alphas_cumprod"),
        (UniPCMultistepScheduler(use_flow_sigmas=True), "noise level: UniPCMultistepScheduler has use_flow_sigmas True"),
        (
            EulerDiscreteScheduler(timestep_type="continuous", prediction_type="v_prediction"),
            "noise level: EulerDiscreteScheduler has timestep_type continuous",
        ),
        (
            UniPCMultistepScheduler(prediction_type="flow_prediction"),
            "prediction type: UniPCMultistepScheduler has flow_prediction; expected one of epsilon, v_prediction, sample",
        ),
    ],
)
def test_a_scheduler_that_does_not_tell_how_noisy_latents_are_is_refused_by_name(scheduler: Any, said: str) -> None:
    pipeline = load_pipeline()
    safety = fitting_module(pipeline, "church")
    check_match(pipeline, safety)
    pipeline.scheduler = scheduler
    with pytest.raises(SafetyMismatchError, match=said):
        check_match(pipeline, safety)
