"""A scheduler's configuration is drawn as diffusers draws it, or refused by name before anything is exported."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import diffusers
import pytest
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2AncestralDiscreteScheduler,
    LCMScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from linear_denoiser import assert_equal, own_keys, theirs
from typer.testing import CliRunner

from benchmarks.small_pipeline import save_small_pipeline
from saferedir.engines.errors import ExportError, RequestError
from saferedir.export.bundle_export import BundleOptions
from saferedir.export.command import export_folder
from saferedir.export.scheduler_config import DPM_MULTISTEP, SAMPLERS, replacement, scheduler_info
from saferedir.runtime.command_line.app import app
from saferedir.runtime.schedulers import SCHEDULERS, make_schedule
from saferedir_torch.models import SHIPPED_SAFETY

LATENT = DDIMScheduler(
    beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False, steps_offset=1
)  # fmt: skip
STEPS = (1, 2, 4, 10, 25, 50)


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


def test_every_key_of_these_classes_is_tried() -> None:
    assert {key for kind in CLASSES for key in own_keys(kind)} == set(VALUES)


@st.composite
def configurations(draw: st.DrawFn) -> tuple[type[Any], dict[str, Any], dict[str, Any]]:
    """A class, values for some of its keys, most of them sound ones, and keys of other classes that its folder keeps."""
    kind = draw(st.sampled_from(CLASSES))
    own = own_keys(kind)
    values = {key: value for key, value in SOUND.items() if key in own}
    for key in draw(st.lists(st.sampled_from(own), unique=True, max_size=6)):
        sound = VALUES[key][: 3 if key in ("beta_schedule", "timestep_spacing", "num_train_timesteps", "steps_offset") else 2]
        values[key] = draw(st.sampled_from(sound) if draw(st.integers(0, 5)) else st.sampled_from(VALUES[key]))
    foreign = [key for key in VALUES if key not in own]
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
    own = [*own_keys(kind), *(("sigma_min", "sigma_max") if kind is DPMSolverMultistepScheduler else ())]
    carried = {key: scheduler.config[key] for key in own if key in scheduler.config and key not in DPM_MULTISTEP}
    stand_in = theirs(info.kind, **carried)
    stand_in.register_to_config(**{key: value for key, value in carried.items() if key.startswith("sigma_m")})
    assert_equal(info, prediction, stand_in, steps)


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
        EulerAncestralDiscreteScheduler(beta_schedule="scaled_linear", timestep_spacing="leading", steps_offset=1),
        DPMSolverMultistepScheduler(beta_schedule="scaled_linear", final_sigmas_type="sigma_min"),
        DPMSolverMultistepScheduler(use_karras_sigmas=True, beta_schedule="scaled_linear", prediction_type="v_prediction"),
        DPMSolverMultistepScheduler(
            rescale_betas_zero_snr=True, timestep_spacing="trailing", prediction_type="v_prediction"
        ),
    ],
    ids=[
        "cosine", "zero SNR", "Karras", "Karras between", "exponential", "zero SNR euler", "lcm cosine", "ancestral",
        "multistep", "multistep Karras", "zero SNR multistep",
    ],
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
        (HeunDiscreteScheduler(), "drawn with euler in place of HeunDiscreteScheduler"),
        (DDPMScheduler(clip_sample=False), "drawn with ddim in place of DDPMScheduler"),
        (
            DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++", use_karras_sigmas=True, solver_order=3),
            "drawn with dpm++-2m-karras in place of DPMSolverMultistepScheduler, without its algorithm_type sde-dpmsolver++, "
            "solver_order 3",
        ),
        (
            KDPM2AncestralDiscreteScheduler(use_karras_sigmas=True),
            "drawn with euler-ancestral in place of KDPM2AncestralDiscreteScheduler, without its use_karras_sigmas True",
        ),
        (LMSDiscreteScheduler(use_karras_sigmas=True), "drawn with euler-karras in place of LMSDiscreteScheduler"),
        (UniPCMultistepScheduler(), "drawn with dpm++-2m in place of UniPCMultistepScheduler, without its solver_order 2"),
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
    kinds = (DDIMScheduler, EulerDiscreteScheduler, EulerAncestralDiscreteScheduler, DPMSolverMultistepScheduler, LCMScheduler)
    own = [kind(**{"clip_sample": False} if "clip_sample" in own_keys(kind) else {}) for kind in kinds]
    assert {replacement(scheduler) for scheduler in own} == {None}
    assert [scheduler_info(scheduler).kind for scheduler in own] == list(SAMPLERS.values())
    assert set(SAMPLERS.values()) < set(SCHEDULERS)


def test_what_stands_in_keeps_the_configuration() -> None:
    info = scheduler_info(PNDMScheduler(steps_offset=1, set_alpha_to_one=False, beta_schedule="scaled_linear"))
    assert (info.steps_offset, info.set_alpha_to_one, info.beta_schedule) == (1, False, "scaled_linear")
    # What a folder keeps of another sampler is not this one's.
    ancestral = EulerAncestralDiscreteScheduler.from_config(EulerDiscreteScheduler(use_karras_sigmas=True).config)
    assert ancestral.config["use_karras_sigmas"]
    assert scheduler_info(ancestral).kind == "euler-ancestral"


def test_bounds_that_the_multistep_solver_reads_undeclared_are_heeded_or_refused() -> None:
    scheduler = DPMSolverMultistepScheduler(use_karras_sigmas=True)
    scheduler.register_to_config(sigma_min=0.1, sigma_max=10.0)
    info = scheduler_info(scheduler)
    assert (info.kind, info.sigma_min, info.sigma_max) == ("dpm++-2m-karras", 0.1, 10.0)
    assert assert_equal(info, "epsilon", scheduler, 7)
    scheduler.register_to_config(sigma_min=0.0)
    with pytest.raises(ExportError, match=r"sigma_min 0\.0.*or null"):
        scheduler_info(scheduler)


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


@pytest.mark.parametrize("kind", SCHEDULERS)
@pytest.mark.parametrize("bundle", BUNDLES)
def test_another_sampler_than_the_bundles_is_diffusers_of_the_same_configuration(bundle: str, kind: str) -> None:
    own = BUNDLES[bundle]
    # Not `from_config`, which takes the other class's defaults where this one's were taken.
    other = {key: value for key, value in own.config.items() if not key.startswith("use_")}
    drawn = [
        assert_equal(scheduler_info(own), own.config.prediction_type, theirs(kind, **other), steps, kind) for steps in STEPS
    ]
    # With more steps diffusers may lose its place, where two timesteps begin alike.
    assert drawn[:2] == [True, True]


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
    replaced = {"PNDMScheduler": "ddim"}
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
