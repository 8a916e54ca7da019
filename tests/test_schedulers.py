"""Linear steps equal diffusers' samplers, for every number of steps, spacing and prediction type."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, LCMScheduler
from msgspec import structs

from saferedir.engines import open_bundle
from saferedir.engines.errors import RequestError
from saferedir.engines.manifest import SchedulerInfo
from saferedir.runtime import Pipeline
from saferedir.runtime.schedulers import SCHEDULERS, Schedule, make_schedule
from saferedir_torch.models import load_pipeline

INFO = SchedulerInfo("ddim", 1000, 0.00085, 0.012, "scaled_linear", "leading", 1, False)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("steps", [1, 2, 7, 25, 50])
def test_equals_diffusers(spacing: str, prediction: str, steps: int) -> None:
    info = structs.replace(INFO, timestep_spacing=spacing, steps_offset=1 if spacing == "leading" else 0)
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


NOISE_SCHEDULE = {"beta_start": INFO.beta_start, "beta_end": INFO.beta_end, "beta_schedule": INFO.beta_schedule}


def drawn(ours: Schedule, outputs: torch.Tensor, noises: torch.Tensor) -> list[np.ndarray]:
    """Latents after each step, and the inputs that the model saw, from given model outputs and noises [steps, ...]."""
    latent = noises[0].numpy() * ours.init_noise_sigma
    history = np.zeros_like(latent)
    seen = []
    for step, (of_latent, of_model, of_history, of_noise) in enumerate(ours.coefficients):
        seen.append(latent * ours.input_scale[step])
        model = outputs[step].numpy()
        latent = of_latent * latent + of_model * model + of_history * history + of_noise * noises[step + 1].numpy()
        history = model
    return [*seen, latent]


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("steps", [1, 2, 7, 14, 15, 25, 50])
@pytest.mark.parametrize("kind", ["euler", "euler v", "dpm-solver", "lcm", "lcm v"])
def test_a_whole_run_equals_diffusers(kind: str, steps: int, spacing: str) -> None:
    kind, _, prediction = kind.partition(" ")
    prediction = "v_prediction" if prediction else "epsilon"
    info = structs.replace(INFO, timestep_spacing=spacing, steps_offset=1 if spacing == "leading" else 0)
    common = {**NOISE_SCHEDULE, "prediction_type": prediction}
    spaced = {"timestep_spacing": spacing, "steps_offset": info.steps_offset}
    theirs = {
        "euler": lambda: EulerDiscreteScheduler(**common, **spaced),
        "dpm-solver": lambda: DPMSolverMultistepScheduler(
            **common, **spaced, algorithm_type="dpmsolver", final_sigmas_type="sigma_min"
        ),
        "lcm": lambda: LCMScheduler(**common, clip_sample=False),
    }[kind]()
    theirs.set_timesteps(steps)
    ours = make_schedule(info, prediction, steps, kind)
    np.testing.assert_allclose(ours.timesteps, theirs.timesteps.numpy(), atol=1e-3)
    generator = torch.Generator().manual_seed(steps)
    outputs, noises = torch.randn(steps, 64, generator=generator), torch.randn(steps + 1, 64, generator=generator)
    expected, latent = [], noises[0] * theirs.init_noise_sigma
    for step, timestep in enumerate(theirs.timesteps):
        expected.append(theirs.scale_model_input(latent, timestep).numpy())
        given = {}
        if kind == "lcm":  # takes its noise from torch's generator
            torch.manual_seed(1000 + step)
            noises[step + 1] = torch.randn(64)
            given["generator"] = torch.Generator().manual_seed(1000 + step)
        latent = theirs.step(outputs[step], timestep, latent, **given).prev_sample
    expected.append(latent.numpy())
    scale = max(float(np.abs(array).max()) for array in expected)
    np.testing.assert_allclose(drawn(ours, outputs, noises), expected, atol=3e-5 * scale)


@pytest.mark.parametrize(("kind", "theirs"), [("euler", EulerDiscreteScheduler), ("lcm", LCMScheduler)])
def test_pictures_equal_those_of_diffusers(pipeline: Pipeline, kind: str, theirs: Any) -> None:
    eager = load_pipeline()
    eager.scheduler = theirs.from_config(eager.scheduler.config)
    seeds = [3, 4]
    prompts = ["a cat on blue", "a fox"]
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    expected = eager(prompts, num_inference_steps=6, guidance_scale=3.0, generator=generators).images
    found = pipeline(prompts, num_inference_steps=6, guidance_scale=3.0, seed=seeds, scheduler=kind).images
    for one, other in zip(found, expected, strict=True):
        assert np.abs(np.asarray(one, int) - np.asarray(other, int)).max() <= 1


def test_pictures_between_timesteps_equal_those_of_diffusers(bundle_copy: Path, edit_manifest: Any) -> None:
    stated = {"kind": "euler", "use_karras_sigmas": True, "final_sigmas_type": "sigma_min"}
    edit_manifest(bundle_copy, lambda raw: raw["scheduler"].update(stated))
    ours = Pipeline.from_bundle(bundle_copy)
    eager = load_pipeline()
    eager.scheduler = EulerDiscreteScheduler.from_config(
        eager.scheduler.config, use_karras_sigmas=True, final_sigmas_type="sigma_min"
    )
    generator = torch.Generator().manual_seed(3)
    expected = eager("a cat on blue", num_inference_steps=6, guidance_scale=3.0, generator=generator).images[0]
    found = ours("a cat on blue", num_inference_steps=6, guidance_scale=3.0, seed=3).images[0]
    assert np.abs(np.asarray(found, int) - np.asarray(expected, int)).max() <= 1
    assert ours("a church", num_inference_steps=6).records[0].steps[0].fired == ("church",)


def test_a_concept_is_redirected_under_every_sampler(pipeline: Pipeline) -> None:
    for kind in SCHEDULERS:
        record = pipeline("a church", num_inference_steps=4, scheduler=kind).records[0]
        assert record.steps[0].fired == ("church",), kind


def test_dpm_solver_needs_noise_predictions_and_lcm_few_steps() -> None:
    with pytest.raises(RequestError, match="predicts noise"):
        make_schedule(INFO, "v_prediction", 5, "dpm-solver")
    with pytest.raises(RequestError, match="at most 50"):
        make_schedule(INFO, "epsilon", 51, "lcm")
    with pytest.raises(RequestError, match="known: ddim, euler, dpm-solver, lcm"):
        make_schedule(INFO, "epsilon", 5, "heun")


@pytest.mark.parametrize("steps", [0, -3, 1000, 10_000])
def test_steps_out_of_range(steps: int) -> None:
    with pytest.raises(RequestError, match="num_inference_steps"):
        make_schedule(INFO, "epsilon", steps)


@pytest.mark.parametrize(("field", "value"), [("kind", "heun"), ("beta_schedule", "cosine"), ("timestep_spacing", "random")])
def test_unknown_schedule_is_refused(field: str, value: str) -> None:
    with pytest.raises(RequestError, match=value):
        make_schedule(structs.replace(INFO, **{field: value}), "epsilon", 5)


def test_unknown_prediction_is_refused() -> None:
    with pytest.raises(RequestError, match="sample"):
        make_schedule(INFO, "sample", 5)


def test_embedded_bundle_states_this_schedule() -> None:
    assert open_bundle("emoji-diffusion").manifest.scheduler == INFO
