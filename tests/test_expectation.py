"""The picture to be expected: told from a prediction or from two latents of a run, and where it reaches the safety."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, LCMScheduler
from small_module import CONCEPTS, TOKENS, WIDTH, small_module

from saferedir.engines.errors import SafetyMismatchError
from saferedir.runtime import Pipeline, SafetyPolicy
from saferedir.runtime.backends import make_backend
from saferedir.runtime.replay import RecordingBackend
from saferedir_torch.controller import Controller, Policy, State
from saferedir_torch.expectation import FARTHEST, expected_in_runs, expected_of_latents, expected_of_prediction
from saferedir_torch.fit import check_match
from saferedir_torch.models import SHIPPED_SAFETY, load_pipeline
from saferedir_torch.protect import protect
from saferedir_torch.safety_module import SafetyModule
from saferedir_torch.safety_run import is_deterministic

ALPHAS = torch.linspace(0.999, 0.005, 1000)
SHAPE = (6, 4, 8, 8)


def randoms(seed: int) -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed)).clamp(-3, 3)


def mixed(picture: torch.Tensor, noise: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
    alpha = ALPHAS[timestep.long()][:, None, None, None]
    return alpha.sqrt() * picture + (1 - alpha).sqrt() * noise


@pytest.mark.parametrize("velocity", [False, True])
def test_a_perfect_prediction_tells_the_picture(velocity: bool) -> None:
    picture, noise, timestep = randoms(0), randoms(1), torch.tensor([0.0, 1, 499.6, 600, 998, 999])
    latent, alpha = mixed(picture, noise, timestep.round()), ALPHAS[timestep.round().long()][:, None, None, None]
    prediction = alpha.sqrt() * noise - (1 - alpha).sqrt() * picture if velocity else noise
    told = expected_of_prediction(latent, timestep, prediction, ALPHAS, velocity=velocity)
    torch.testing.assert_close(told, picture, atol=1e-4, rtol=1e-4)
    prediction[2:4] = 0
    told = expected_of_prediction(latent, timestep, prediction, ALPHAS, velocity=velocity)
    assert not told[2:4].any()
    assert told[4:].any()
    wild = expected_of_prediction(latent, timestep, 1e6 * noise, ALPHAS, velocity=velocity)
    assert float(wild.abs().max()) == FARTHEST


@torch.no_grad()
def test_two_latents_of_a_run_tell_what_its_prediction_did() -> None:
    scheduler = DDIMScheduler.from_config(load_pipeline().scheduler.config)
    scheduler.set_timesteps(12)
    alphas, latent, latents, predictions = scheduler.alphas_cumprod, randoms(0), list[torch.Tensor](), list[torch.Tensor]()
    for index, timestep in enumerate(scheduler.timesteps):
        latents.append(latent)
        predictions.append(0.7 * latent + 0.3 * randoms(index))
        latent = scheduler.step(predictions[-1], timestep, latent).prev_sample
    found = expected_in_runs(torch.stack(latents, dim=1), scheduler.timesteps, alphas)
    assert not found[:, 0].any()
    for step in range(1, 12):
        time, before = (scheduler.timesteps[at].float().expand(len(latent)) for at in (step, step - 1))
        told = expected_of_prediction(latents[step], time, predictions[step - 1], alphas, velocity=False)
        torch.testing.assert_close(found[:, step], told, atol=2e-3, rtol=1e-3)
        of_two = expected_of_latents(latents[step - 1], before, latents[step], time, alphas)
        torch.testing.assert_close(of_two, found[:, step])


@torch.no_grad()
def test_the_controller_looks_at_it_and_at_whether_it_is_finite() -> None:
    controller = Controller(small_module(alone=True))
    controller.module.last_branch.alone_gains.fill_(50.0)
    latent, prompt = torch.randn(3, 4, 16, 16), torch.randn(3, TOKENS, WIDTH)
    policy = Policy(
        torch.ones(3, dtype=torch.int32), torch.ones(3, CONCEPTS, dtype=torch.bool), torch.full((3, CONCEPTS), 0.5),
        torch.ones(3, CONCEPTS),
    )  # fmt: skip
    time, state = torch.full((3,), 500.0), State.initial(prompt, CONCEPTS)
    _, without = controller(latent, time, prompt, state, policy)
    _, zero = controller(latent, time, prompt, state, policy, history=torch.zeros_like(latent))
    assert torch.equal(without.score, zero.score)
    history = torch.randn(latent.shape, generator=torch.Generator().manual_seed(2))
    history[2] = 0
    _, other = controller(latent, time, prompt, state, policy, history=history)
    assert not torch.equal(other.score[:2], zero.score[:2])
    torch.testing.assert_close(other.score[2], zero.score[2])
    history[1, 0, 0, 0] = float("nan")
    ended, _ = controller(latent, time, prompt, state, policy, history=history)
    assert ended.ok.tolist() == [True, False, True]


@pytest.mark.parametrize("scheduler", ["ddim", "euler", "lcm"])
def test_the_loop_hands_on_what_was_predicted_or_the_noise_that_was_added(scheduler: str) -> None:
    shipped = Pipeline.from_bundle()
    recording = RecordingBackend(make_backend(shipped.bundle, "ort-cpu", threads=1), shipped.manifest.engines)
    Pipeline(shipped.bundle, recording, SafetyPolicy())("a cat", num_inference_steps=3, scheduler=scheduler)
    first, *later = recording.recorded["step"]
    assert not np.asarray(first["history"]).any()
    for before, given in zip([first, *later], later, strict=False):
        assert np.asarray(given["history"]).any()
        assert np.array_equal(given["history"], before["noise"]) == (scheduler == "lcm")


@torch.no_grad()
def test_lcm_tells_the_picture_that_it_added_noise_to() -> None:
    pipeline, safety = load_pipeline(), SafetyModule.load(SHIPPED_SAFETY)
    pipeline.scheduler = LCMScheduler.from_config(pipeline.scheduler.config)
    told: list[torch.Tensor] = []
    estimates: list[torch.Tensor] = []
    step, expected = LCMScheduler.step, SafetyModule.expected

    def recording_step(*args: Any, **kwargs: Any) -> Any:
        output = step(*args, **kwargs)
        estimates.append(output[1])
        return output

    def recording_expected(*args: Any) -> Any:
        told.append(expected(*args))
        return told[-1]

    with pytest.MonkeyPatch.context() as patch, protect(pipeline, safety):
        patch.setattr(LCMScheduler, "step", recording_step)
        patch.setattr(SafetyModule, "expected", recording_expected)
        pipeline("a cat", num_inference_steps=4, output_type="np", generator=torch.Generator().manual_seed(3))
    nothing, *told = told
    assert not nothing.any()
    assert len(told) == 3
    for ahead, estimate in zip(told, estimates, strict=False):
        torch.testing.assert_close(ahead, estimate.clamp(-FARTHEST, FARTHEST), atol=2e-2, rtol=1e-2)


def test_samplers_that_add_noise_are_known() -> None:
    assert is_deterministic(DDIMScheduler())
    assert is_deterministic(DPMSolverMultistepScheduler())
    assert not is_deterministic(DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++"))
    assert not is_deterministic(LCMScheduler())


def test_another_noise_schedule_is_refused() -> None:
    pipeline, safety = load_pipeline(), SafetyModule.load(SHIPPED_SAFETY)
    check_match(pipeline, safety)
    changed: Any = DDIMScheduler.from_config(pipeline.scheduler.config, beta_end=0.02)
    pipeline.scheduler = changed
    with pytest.raises(SafetyMismatchError, match=r"noise schedule: signal shares differ by up to 0\.\d+"):
        check_match(pipeline, safety)
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler()  # of another kind of model
    with pytest.raises(SafetyMismatchError, match=r"prediction type: .* made for epsilon, the pipeline has none"):
        check_match(pipeline, safety)
