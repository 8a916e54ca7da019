"""A scheduler's configuration is drawn as diffusers draws it, or refused by name before anything is exported."""

from __future__ import annotations

import inspect
import math
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from benchmarks.small_pipeline import save_small_pipeline
from saferedir.engines.errors import ExportError, RequestError
from saferedir.engines.manifest import SchedulerInfo
from saferedir.export.bundle_export import BundleOptions
from saferedir.export.command import export_folder
from saferedir.export.scheduler_config import SAMPLERS, replacement, scheduler_info
from saferedir.runtime.command_line.app import app
from saferedir.runtime.schedulers import SCHEDULERS, Schedule, make_schedule
from saferedir_torch.models import SHIPPED_SAFETY

LATENT = DDIMScheduler(
    beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False, steps_offset=1
)  # fmt: skip
SIZE = 16
MODEL = 0.3 * np.random.default_rng(0).standard_normal((SIZE, SIZE))
STEPS = (1, 2, 4, 10, 25, 50)


def predicted(latent: np.ndarray, timestep: float) -> np.ndarray:
    """A model that is linear in the latent and told the timestep."""
    return np.asarray(MODEL @ latent + math.sin(timestep / 100))


def run_theirs(scheduler: Any, steps: int) -> tuple[list[float], list[np.ndarray]]:
    """Timesteps, and the latents before, between and after them."""
    scheduler.set_timesteps(steps)
    noise = torch.Generator().manual_seed(steps)
    latent = torch.randn(SIZE, generator=noise, dtype=torch.float64) * scheduler.init_noise_sigma
    latents = [latent.numpy()]
    given = {"generator": noise} if "generator" in inspect.signature(scheduler.step).parameters else {}
    for timestep in scheduler.timesteps:
        seen = scheduler.scale_model_input(latent, timestep).numpy()
        output = torch.from_numpy(predicted(seen, float(timestep)))
        latent = scheduler.step(output, timestep, latent, **given, return_dict=False)[0].double()
        latents.append(latent.numpy())
    return scheduler.timesteps.tolist(), latents


def run_ours(schedule: Schedule, steps: int) -> list[np.ndarray]:
    noise = torch.Generator().manual_seed(steps)
    latent = torch.randn(SIZE, generator=noise, dtype=torch.float64).numpy() * schedule.init_noise_sigma
    before, latents = np.zeros(SIZE), [latent]
    for timestep, scale, factors in zip(
        schedule.timesteps, schedule.input_scale, schedule.coefficients.astype(np.float64), strict=True
    ):
        output = predicted(latent * scale, float(timestep))
        fresh = torch.randn(SIZE, generator=noise, dtype=torch.float64).numpy() if factors[3] else np.zeros(SIZE)
        latent = factors @ np.stack([latent, output, before, fresh])
        before = output
        latents.append(latent)
    return latents


def assert_equal(info: SchedulerInfo, prediction: str, theirs: Any, steps: int, kind: str | None = None) -> bool:
    """Whether both drew; fails where they drew otherwise."""
    try:
        ours = make_schedule(info, prediction, steps, kind)
    except RequestError as error:
        assert str(error).startswith(("num_inference_steps is", "dpm-solver "))
        return False
    try:
        timesteps, expected = run_theirs(theirs, steps)
    except (ValueError, IndexError, ZeroDivisionError):
        return False
    if not np.isfinite(expected).all():
        return False
    assert len(ours.timesteps) == len(timesteps)
    np.testing.assert_allclose(ours.timesteps, timesteps, atol=2e-3)
    # Latents are of magnitude 1 where a model draws; below, what counts is the last bit of a signal share near 1.
    scale = max(1.0, *(float(np.abs(latent).max()) for latent in expected))
    # torch's square root, which rescaling takes, is off by a bit on some machines.
    allowed = 1e-4 if info.rescale_betas_zero_snr else 1e-5
    np.testing.assert_allclose(run_ours(ours, steps), expected, atol=allowed * scale, rtol=0)
    return True


#: Plausible and odd values of every key that these classes know.
VALUES: dict[str, list[Any]] = {
    "num_train_timesteps": [1000, 500, 100, 7, 2],
    "beta_start": [0.00085, 0.0001, 0.01, -0.1, 0, 1.5, math.nan],
    "beta_end": [0.012, 0.02, 0.5, 0.0001, 1.0, math.inf],
    "beta_schedule": ["scaled_linear", "linear", "squaredcos_cap_v2", "sigmoid"],
    "trained_betas": [None, [0.01] * 1000],
    "prediction_type": ["epsilon", "v_prediction", "sample", "flow_prediction"],
    "timestep_spacing": ["leading", "trailing", "linspace", "karras"],
    "steps_offset": [0, 1, 3, 200, 999, -1, 0.5],
    "rescale_betas_zero_snr": [True, False, None],
    "clip_sample": [False, True, 0],
    "clip_sample_range": [1.0, 3.0],
    "thresholding": [False, True],
    "dynamic_thresholding_ratio": [0.995, 0.9],
    "sample_max_value": [1.0, 2.0],
    "set_alpha_to_one": [True, False, 0],
    "interpolation_type": ["linear", "log_linear", "cubic"],
    "use_karras_sigmas": [True, False],
    "use_exponential_sigmas": [True, False],
    "use_beta_sigmas": [False, True],
    "sigma_min": [None, 0.03, 0.5, 0.0, -1.0],
    "sigma_max": [None, 14.0, 80, math.inf],
    "timestep_type": ["discrete", "continuous"],
    "final_sigmas_type": ["zero", "sigma_min", "half"],
    "original_inference_steps": [50, 25, 4, 100, 2000],
    "timestep_scaling": [10.0, 1, 0.0],
    "solver_order": [2, 1, 3],
    "algorithm_type": ["dpmsolver", "dpmsolver++", "sde-dpmsolver++", "deis"],
    "solver_type": ["midpoint", "heun", "bh2"],
    "lower_order_final": [True, False],
    "euler_at_final": [False, True],
    "use_lu_lambdas": [False, True],
    "use_flow_sigmas": [False, True],
    "flow_shift": [1.0, 3.0],
    "lambda_min_clipped": [-math.inf, -5.1],
    "variance_type": [None, "learned_range"],
    "use_dynamic_shifting": [False, True],
    "time_shift_type": ["exponential"],
    "skip_prk_steps": [True, False],
}
CLASSES = (
    DDIMScheduler, EulerDiscreteScheduler, EulerAncestralDiscreteScheduler, DPMSolverMultistepScheduler, LCMScheduler,
    PNDMScheduler,
)  # fmt: skip
#: What lets most configurations be drawn, so that not all are refused for the same reason.
SOUND = {"clip_sample": False}
DPM_SOLVER = {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}


def own_keys(kind: type[Any]) -> list[str]:
    return [name for name in inspect.signature(kind.__init__).parameters if name != "self"]


def test_every_key_of_these_classes_is_tried() -> None:
    assert {key for kind in CLASSES for key in own_keys(kind)} == set(VALUES)


@st.composite
def configurations(draw: st.DrawFn) -> tuple[type[Any], dict[str, Any], dict[str, Any]]:
    """A class, values for some of its keys, most of them sound ones, and keys of other classes that its folder keeps."""
    kind = draw(st.sampled_from(CLASSES))
    own = own_keys(kind)
    values = {key: value for key, value in SOUND.items() if key in own}
    if kind is DPMSolverMultistepScheduler and draw(st.booleans()):
        values |= DPM_SOLVER
    for key in draw(st.lists(st.sampled_from(own), unique=True, max_size=6)):
        sound = VALUES[key][: 3 if key in ("beta_schedule", "timestep_spacing", "num_train_timesteps", "steps_offset") else 2]
        values[key] = draw(st.sampled_from(sound) if draw(st.integers(0, 5)) else st.sampled_from(VALUES[key]))
    foreign = [
        key for key in VALUES if key not in own and not (kind is DPMSolverMultistepScheduler and key.startswith("sigma_"))
    ]
    left = {
        key: draw(st.sampled_from(VALUES[key])) for key in draw(st.lists(st.sampled_from(foreign), unique=True, max_size=2))
    }
    return kind, values, left


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow])
@given(configurations(), st.sampled_from(STEPS))
def test_a_configuration_is_drawn_as_diffusers_draws_it_or_refused(
    drawn: tuple[type[Any], dict[str, Any], dict[str, Any]], steps: int
) -> None:
    kind, values, left = drawn
    try:
        scheduler = kind(**values)
        scheduler.register_to_config(**left)
        scheduler.set_timesteps(steps)
    except (ValueError, TypeError, NotImplementedError, ZeroDivisionError, RuntimeError, IndexError):
        assume(False)
    try:
        info = scheduler_info(scheduler)
    except ExportError as error:
        assert kind.__name__ in str(error) or "cannot be drawn with" in str(error)
        return
    prediction = scheduler.config.prediction_type
    if not info.in_place_of:
        assert_equal(info, prediction, scheduler, steps)
        return
    assert info.in_place_of == kind.__name__
    stand_in = {"ddim": DDIMScheduler, "euler": EulerDiscreteScheduler}[info.kind]
    carried = {key: scheduler.config[key] for key in own_keys(stand_in) if key in own_keys(kind)}
    assert_equal(info, prediction, stand_in(**{"clip_sample": False} | carried if info.kind == "ddim" else carried), steps)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize(
    "scheduler",
    [
        DDIMScheduler(clip_sample=False, beta_schedule="squaredcos_cap_v2", steps_offset=1),
        DDIMScheduler(
            clip_sample=False, rescale_betas_zero_snr=True, timestep_spacing="trailing", prediction_type="v_prediction"
        ),
        EulerDiscreteScheduler(use_karras_sigmas=True, beta_schedule="scaled_linear", timestep_spacing="leading"),
        EulerDiscreteScheduler(use_karras_sigmas=True, sigma_min=0.03, sigma_max=14.0, prediction_type="v_prediction"),
        EulerDiscreteScheduler(use_exponential_sigmas=True, final_sigmas_type="sigma_min"),
        EulerDiscreteScheduler(rescale_betas_zero_snr=True, timestep_spacing="trailing", prediction_type="v_prediction"),
        LCMScheduler(beta_schedule="squaredcos_cap_v2", original_inference_steps=100),
        DPMSolverMultistepScheduler(algorithm_type="dpmsolver", final_sigmas_type="sigma_min", beta_schedule="scaled_linear"),
    ],
    ids=["cosine", "zero SNR", "Karras", "Karras between", "exponential", "zero SNR euler", "lcm cosine", "dpm-solver"],
)  # fmt: skip
def test_what_is_known_equals_diffusers(scheduler: Any, steps: int) -> None:
    info = scheduler_info(scheduler)
    assert info.in_place_of == ""
    assert assert_equal(info, scheduler.config.prediction_type, scheduler, steps)


@pytest.mark.parametrize(
    ("scheduler", "says"),
    [
        (DDIMScheduler(clip_sample=True), "DDIMScheduler has clip_sample True.*expected False"),
        (DDIMScheduler(clip_sample=False, thresholding=True), "thresholding True"),
        (DDIMScheduler(clip_sample=False, prediction_type="sample"), "prediction_type 'sample'.*'epsilon' or 'v_prediction'"),
        (DDIMScheduler(clip_sample=False, trained_betas=[0.1] * 1000), r"trained_betas \[0\.1"),
        (EulerDiscreteScheduler(timestep_type="continuous"), "timestep_type 'continuous'"),
        (EulerDiscreteScheduler(interpolation_type="log_linear"), "interpolation_type 'log_linear'"),
        (EulerDiscreteScheduler(use_beta_sigmas=True), "use_beta_sigmas True"),
        (EulerDiscreteScheduler(final_sigmas_type="half"), "final_sigmas_type 'half'"),
        (EulerDiscreteScheduler(beta_end=1.5), "beta_end 1.5.*above 0 and below 1"),
        (DDIMScheduler(clip_sample=False, steps_offset=-1), "steps_offset -1"),
        (DDIMScheduler(clip_sample=False, steps_offset=5000), "steps_offset 5000.*below 1001"),
        (LCMScheduler(timestep_scaling=0), "timestep_scaling 0.*above 0"),
        (EulerDiscreteScheduler(use_karras_sigmas=True, sigma_min=0.0), r"sigma_min 0\.0.*or null"),
        (EulerDiscreteScheduler(beta_start=0.02, beta_end=0.01), "beta_end 0.01 below beta_start 0.02"),
        (LCMScheduler(original_inference_steps=2000), "cannot be drawn with: .*at most 2000 of 1000"),
        (
            DDIMScheduler(clip_sample=False, rescale_betas_zero_snr=True, timestep_spacing="trailing"),
            "cannot be drawn with: .*signal or noise of zero",
        ),
        (FlowMatchEulerDiscreteScheduler(), "FlowMatchEulerDiscreteScheduler is not known here; save the model with"),
        (EDMEulerScheduler(), "EDMEulerScheduler is not known here"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_what_is_not_understood_is_refused_by_name(scheduler: Any, says: str) -> None:
    with pytest.raises(ExportError, match=says):
        scheduler_info(scheduler)


def test_a_key_that_no_sampler_knows_is_refused_by_name() -> None:
    scheduler = DDIMScheduler(clip_sample=False)
    scheduler.register_to_config(warp_factor=3)
    with pytest.raises(ExportError, match="key 'warp_factor'"):
        scheduler_info(scheduler)


@pytest.mark.parametrize(
    ("scheduler", "says"),
    [
        (PNDMScheduler(skip_prk_steps=True), "drawn with ddim in place of PNDMScheduler, without its skip_prk_steps True"),
        (EulerAncestralDiscreteScheduler(), "drawn with euler in place of EulerAncestralDiscreteScheduler"),
        (HeunDiscreteScheduler(), "drawn with euler in place of HeunDiscreteScheduler"),
        (DDPMScheduler(clip_sample=False), "drawn with ddim in place of DDPMScheduler"),
        (
            DPMSolverMultistepScheduler(use_karras_sigmas=True),
            "drawn with euler in place of DPMSolverMultistepScheduler, without its solver_order 2, algorithm_type dpm",
        ),
        (UniPCMultistepScheduler(), "drawn with euler in place of UniPCMultistepScheduler, without its solver_order 2"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_a_sampler_in_place_of_another_is_said(scheduler: Any, says: str) -> None:
    assert str(replacement(scheduler)).startswith(says)
    assert scheduler_info(scheduler).in_place_of == type(scheduler).__name__


class StoppedError(Exception):
    """Ends an export where it says something."""


def test_a_sampler_in_place_of_another_is_said_before_anything_is_done(tmp_path: Path) -> None:
    save_small_pipeline(tmp_path / "model", width=32, heads=2, scheduler=PNDMScheduler(steps_offset=1, skip_prk_steps=True))

    def stop(note: str) -> None:
        raise StoppedError(note)

    with pytest.raises(StoppedError, match="drawn with ddim in place of PNDMScheduler, without its skip_prk_steps True"):
        export_folder(tmp_path / "model", SHIPPED_SAFETY, tmp_path / "b", BundleOptions(name="x"), on_step=stop, on_note=stop)


def test_a_scheduler_that_is_not_understood_is_refused_before_anything_is_done(tmp_path: Path) -> None:
    scheduler = EulerDiscreteScheduler(timestep_type="continuous", steps_offset=1)
    save_small_pipeline(tmp_path / "model", width=32, heads=2, scheduler=scheduler)
    with pytest.raises(ExportError, match="timestep_type 'continuous', which is not known here; expected 'discrete'"):
        export_folder(tmp_path / "model", SHIPPED_SAFETY, tmp_path / "b", BundleOptions(name="x"), on_step=pytest.fail)
    assert not (tmp_path / "b").exists()


def test_inspect_says_which_sampler_stands_in(bundle_copy: Path, edit_manifest: Any) -> None:
    edit_manifest(bundle_copy, lambda raw: raw["scheduler"].update(in_place_of="PNDMScheduler"))
    said = CliRunner().invoke(app, ["inspect", str(bundle_copy)])
    assert said.exit_code == 0
    assert "drawn with ddim in place of PNDMScheduler" in said.output


def test_nothing_is_said_where_the_sampler_is_the_models_own() -> None:
    assert {replacement(kind(clip_sample=False)) for kind in (DDIMScheduler, LCMScheduler)} == {None}
    assert replacement(EulerDiscreteScheduler()) is None
    assert set(SAMPLERS.values()) | {"dpm-solver"} == set(SCHEDULERS)


def test_what_stands_in_keeps_the_configuration() -> None:
    info = scheduler_info(PNDMScheduler(steps_offset=1, set_alpha_to_one=False, beta_schedule="scaled_linear"))
    assert (info.steps_offset, info.set_alpha_to_one, info.beta_schedule) == (1, False, "scaled_linear")
    assert scheduler_info(DPMSolverMultistepScheduler(use_karras_sigmas=True, final_sigmas_type="sigma_min")).use_karras_sigmas
    # What a folder keeps of another sampler is not this one's.
    ancestral = EulerAncestralDiscreteScheduler.from_config(EulerDiscreteScheduler(use_karras_sigmas=True).config)
    assert ancestral.config["use_karras_sigmas"]
    assert not scheduler_info(ancestral).use_karras_sigmas


BUNDLES = {
    **{
        spacing: DDIMScheduler.from_config(LATENT.config, timestep_spacing=spacing)
        for spacing in ("leading", "trailing", "linspace")
    },
    "cosine": DDIMScheduler.from_config(LATENT.config, beta_schedule="squaredcos_cap_v2"),
    "zero SNR": DDIMScheduler(
        clip_sample=False, rescale_betas_zero_snr=True, timestep_spacing="trailing", prediction_type="v_prediction"
    ),
    "Karras": EulerDiscreteScheduler(use_karras_sigmas=True, beta_schedule="scaled_linear", timestep_spacing="trailing"),
    "of another": EulerDiscreteScheduler.from_config(PNDMScheduler(set_alpha_to_one=False, steps_offset=1).config),
    "few steps": LCMScheduler(original_inference_steps=25),
}  # fmt: skip


@pytest.mark.parametrize("kind", ["ddim", "euler", "dpm-solver", "lcm"])
@pytest.mark.parametrize("bundle", BUNDLES)
def test_another_sampler_than_the_bundles_is_diffusers_of_the_same_configuration(bundle: str, kind: str) -> None:
    own = BUNDLES[bundle]
    further: dict[str, Any] = {"clip_sample": False} if kind == "ddim" else DPM_SOLVER if kind == "dpm-solver" else {}
    other = {
        "ddim": DDIMScheduler, "euler": EulerDiscreteScheduler, "lcm": LCMScheduler, "dpm-solver": DPMSolverMultistepScheduler,
    }[kind]  # fmt: skip
    # Not `from_config`, which takes the other class's defaults where this one's were taken.
    theirs = other(**{key: own.config[key] for key in own_keys(other) if key in own.config} | further)
    drawn = [assert_equal(scheduler_info(own), own.config.prediction_type, theirs, steps, kind) for steps in STEPS]
    if kind == "dpm-solver" and bundle in ("zero SNR", "Karras"):
        assert not any(drawn)  # it needs noise predictions, and timesteps
    else:
        assert drawn[:4] == [True] * 4


def test_dpm_solver_does_not_leave_out_how_noise_levels_are_spaced() -> None:
    with pytest.raises(RequestError, match=r"dpm-solver visits noise levels by timesteps.*take euler"):
        make_schedule(scheduler_info(BUNDLES["Karras"]), "epsilon", 5, "dpm-solver")


#: Scheduler configurations as models on the hub have them.
PUBLISHED: dict[str, dict[str, Any]] = {
    "PNDMScheduler": {  # Stable Diffusion 1.5
        "beta_end": 0.012, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "num_train_timesteps": 1000,
        "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1, "trained_betas": None, "clip_sample": False,
    },
    "DDIMScheduler": {  # Stable Diffusion 2.1
        "beta_end": 0.012, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "clip_sample": False,
        "num_train_timesteps": 1000, "prediction_type": "v_prediction", "set_alpha_to_one": False, "skip_prk_steps": True,
        "steps_offset": 1, "trained_betas": None,
    },
    "EulerDiscreteScheduler": {  # SD-Turbo
        "beta_end": 0.012, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "clip_sample": False,
        "interpolation_type": "linear", "num_train_timesteps": 1000, "prediction_type": "epsilon", "sample_max_value": 1.0,
        "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1, "timestep_spacing": "trailing",
        "trained_betas": None, "use_karras_sigmas": False,
    },
    "LCMScheduler": {  # LCM Dreamshaper
        "beta_end": 0.012, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "clip_sample": False,
        "clip_sample_range": 1.0, "dynamic_thresholding_ratio": 0.995, "num_train_timesteps": 1000,
        "original_inference_steps": 50, "prediction_type": "epsilon", "rescale_betas_zero_snr": False, "sample_max_value": 1.0,
        "set_alpha_to_one": True, "steps_offset": 1, "thresholding": False, "timestep_scaling": 10.0,
        "timestep_spacing": "leading", "trained_betas": None,
    },
    "DPMSolverMultistepScheduler": {  # PixArt
        "algorithm_type": "dpmsolver++", "beta_end": 0.02, "beta_schedule": "linear", "beta_start": 0.0001,
        "dynamic_thresholding_ratio": 0.995, "euler_at_final": False, "lambda_min_clipped": -math.inf,
        "lower_order_final": True, "num_train_timesteps": 1000, "prediction_type": "epsilon", "sample_max_value": 1.0,
        "solver_order": 2, "solver_type": "midpoint", "steps_offset": 0, "thresholding": False, "timestep_spacing": "linspace",
        "trained_betas": None, "use_karras_sigmas": False, "use_lu_lambdas": False, "variance_type": None,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_configurations_of_published_models_are_understood(name: str) -> None:
    info = scheduler_info(getattr(diffusers, name).from_config(PUBLISHED[name]))
    replaced = {"PNDMScheduler": "ddim", "DPMSolverMultistepScheduler": "euler"}
    assert (info.kind, info.in_place_of) == ((replaced[name], name) if name in replaced else (SAMPLERS[name], ""))


def test_a_number_of_steps_that_a_spacing_cannot_do_is_named() -> None:
    trailing = scheduler_info(DDIMScheduler.from_config(LATENT.config, timestep_spacing="trailing"))
    with pytest.raises(RequestError, match=r"num_inference_steps is 61, for which timestep_spacing 'trailing'.*62 timesteps"):
        make_schedule(trailing, "epsilon", 61)
    late = scheduler_info(DDIMScheduler.from_config(LATENT.config, steps_offset=100))
    with pytest.raises(RequestError, match=r"num_inference_steps is 25, .*steps_offset 100 gives 25 timesteps from 1060"):
        make_schedule(late, "epsilon", 25)
    with pytest.raises(RequestError, match=r"num_inference_steps is 25, .*from 1060"):
        make_schedule(late, "epsilon", 25, "euler")
