"""The linear step equals diffusers' DDIM, for every number of steps and both prediction types."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

from saferedir.engines import open_bundle
from saferedir.engines.errors import RequestError
from saferedir.engines.manifest import SchedulerInfo
from saferedir.runtime.schedulers import make_schedule

INFO = SchedulerInfo("ddim", 1000, 0.00085, 0.012, "scaled_linear", "leading", 1, False)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("steps", [1, 2, 7, 25, 50])
def test_equals_diffusers(spacing: str, prediction: str, steps: int) -> None:
    info = dataclasses.replace(INFO, timestep_spacing=spacing, steps_offset=1 if spacing == "leading" else 0)
    theirs = DDIMScheduler(
        beta_start=info.beta_start, beta_end=info.beta_end, beta_schedule=info.beta_schedule, clip_sample=False,
        set_alpha_to_one=False, steps_offset=info.steps_offset, timestep_spacing=spacing, prediction_type=prediction,
    )  # fmt: skip
    theirs.set_timesteps(steps)
    ours = make_schedule(info, prediction, steps)
    assert ours.timesteps.tolist() == theirs.timesteps.tolist()
    generator = torch.Generator().manual_seed(0)
    for timestep, (latent, model, history, noise) in zip(theirs.timesteps, ours.coefficients, strict=True):
        z, e = torch.randn(2, 64, generator=generator)
        expected = theirs.step(e, timestep, z).prev_sample.numpy()
        np.testing.assert_allclose(latent * z.numpy() + model * e.numpy(), expected, rtol=2e-5, atol=2e-5)
        assert history == noise == 0


@pytest.mark.parametrize("steps", [0, -3, 1000, 10_000])
def test_steps_out_of_range(steps: int) -> None:
    with pytest.raises(RequestError, match="num_inference_steps"):
        make_schedule(INFO, "epsilon", steps)


@pytest.mark.parametrize(("field", "value"), [("kind", "heun"), ("beta_schedule", "cosine"), ("timestep_spacing", "random")])
def test_unknown_schedule_is_refused(field: str, value: str) -> None:
    with pytest.raises(RequestError, match=value):
        make_schedule(dataclasses.replace(INFO, **{field: value}), "epsilon", 5)


def test_unknown_prediction_is_refused() -> None:
    with pytest.raises(RequestError, match="sample"):
        make_schedule(INFO, "sample", 5)


def test_embedded_bundle_states_this_schedule() -> None:
    assert open_bundle("emoji-diffusion").manifest.scheduler == INFO
