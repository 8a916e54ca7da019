"""A denoiser that is linear in the latent, drawn with by a sampler of diffusers and by ours, in double precision."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
)

from saferedir.engines.errors import RequestError
from saferedir.engines.manifest import SchedulerInfo
from saferedir.engines.step import NUMBERS
from saferedir.runtime.noise_levels import sigmas_of
from saferedir.runtime.schedulers import Schedule, make_schedule

SIZE = 16
MODEL = 0.3 * np.random.default_rng(0).standard_normal((SIZE, SIZE))
#: Name of a sampler -> diffusers' class and what to configure it with.
THEIRS: dict[str, tuple[Any, dict[str, Any]]] = {
    "ddim": (DDIMScheduler, {"clip_sample": False}),
    "euler": (EulerDiscreteScheduler, {}),
    "euler-karras": (EulerDiscreteScheduler, {"use_karras_sigmas": True}),
    "euler-exponential": (EulerDiscreteScheduler, {"use_exponential_sigmas": True}),
    "euler-ancestral": (EulerAncestralDiscreteScheduler, {}),
    "dpm++-2m": (DPMSolverMultistepScheduler, {}),
    "dpm++-2m-karras": (DPMSolverMultistepScheduler, {"use_karras_sigmas": True}),
    "dpm++-2m-exponential": (DPMSolverMultistepScheduler, {"use_exponential_sigmas": True}),
    "lcm": (LCMScheduler, {"clip_sample": False}),
}


def theirs(kind: str, **config: Any) -> Any:
    """diffusers' sampler of that name, with what of `config` its class knows."""
    own, further = THEIRS[kind]
    return own(**{key: value for key, value in config.items() if key in own_keys(own)} | further)


def own_keys(kind: type[Any]) -> list[str]:
    return [name for name in inspect.signature(kind.__init__).parameters if name != "self"]


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
        seen = scheduler.scale_model_input(latent, timestep).double().numpy()
        output = torch.from_numpy(predicted(seen, float(timestep)))
        latent = scheduler.step(output, timestep, latent, **given, return_dict=False)[0].double()
        latents.append(latent.numpy())
    return scheduler.timesteps.tolist(), latents


def run_ours(schedule: Schedule, steps: int) -> list[np.ndarray]:
    noise = torch.Generator().manual_seed(steps)
    latent = torch.randn(SIZE, generator=noise, dtype=torch.float64).numpy() * schedule.init_noise_sigma
    return updates(
        schedule, latent, lambda step, seen: predicted(seen, float(schedule.timesteps[step])),
        lambda: torch.randn(SIZE, generator=noise, dtype=torch.float64).numpy(),
    )  # fmt: skip


def updates(
    schedule: Schedule,
    latent: np.ndarray,
    output_of: Callable[[int, np.ndarray], np.ndarray],
    fresh: Callable[[], np.ndarray],
) -> list[np.ndarray]:
    """Latents before, between and after the steps, of a model whose output is that of (step, latent as it sees it)."""
    before, latents = np.zeros_like(latent), [latent]
    for step, row in enumerate(schedule.numbers.astype(np.float64)):
        n = dict(zip(NUMBERS, row, strict=True))
        denoised = n["from_latent"] * latent + n["from_output"] * output_of(step, n["input_scale"] * latent)
        noise = n["of_noise"] * fresh() if n["of_noise"] else 0.0
        latent = n["of_latent"] * latent + n["of_denoised"] * denoised + n["of_before"] * before + noise
        before = denoised
        latents.append(latent)
    return latents


def assert_equal(info: SchedulerInfo, prediction: str, scheduler: Any, steps: int, kind: str | None = None) -> bool:
    """Whether both drew; fails where they drew otherwise."""
    try:
        ours = make_schedule(info, prediction, steps, kind)
    except RequestError as error:
        assert str(error).startswith("num_inference_steps is")
        return False
    try:
        timesteps, expected = run_theirs(scheduler, steps)
    except (ValueError, IndexError, ZeroDivisionError):
        return False
    if not np.isfinite(expected).all():
        return False
    assert len(ours.timesteps) == len(timesteps)
    if info.kind == "dpm++-2m-exponential" and _turns_on_a_bit(info, ours.timesteps, timesteps, scheduler.sigmas):
        return False
    # torch's square root, which rescaling to zero SNR takes, is off by a bit on some machines, and a cosine makes much of it.
    zero = info.rescale_betas_zero_snr
    np.testing.assert_allclose(ours.timesteps, timesteps, atol=2e-2 if zero else 2e-3)
    allowed = 1e-3 if zero and info.beta_schedule == "squaredcos_cap_v2" else 1e-5
    # Latents are of magnitude 1 where a model draws; below, what counts is the last bit of a signal share near 1.
    scale = max(1.0, *(float(np.abs(latent).max()) for latent in expected))
    np.testing.assert_allclose(run_ours(ours, steps), expected, atol=allowed * scale, rtol=0)
    return True


def _turns_on_a_bit(info: SchedulerInfo, ours: Any, theirs: Any, levels: Any) -> bool:
    """Whether timesteps differ, and by one alone where the level is that of a whole timestep: diffusers cuts off what is behind
    the point, so that the last bit of a logarithm, which is not the same on all machines, decides between it and the one below.
    """
    other = np.flatnonzero(np.abs(np.asarray(ours) - np.asarray(theirs)) == 1)
    whole = np.maximum(ours, theirs)[other].astype(np.int64)
    return bool(len(other) and np.allclose(sigmas_of(info)[whole], np.asarray(levels)[other], rtol=1e-5, atol=0))
