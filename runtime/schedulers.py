"""Schedulers as tables: every step is one linear map, so the loop and the fused graph need no branches.

    z' = c_latent z + c_model e + c_history h + c_noise n

with e the model's (guided) output. A scheduler is a function from the noise schedule and the number of steps to the
coefficients; adding one touches this file alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from saferedir.engines.errors import RequestError
from saferedir.engines.manifest import SchedulerInfo
from saferedir.runtime.request import as_integer

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Schedule:
    """What the loop needs of a sampler for one number of steps."""

    #: [steps] in the scale 0..999.
    timesteps: Float32
    #: [steps, 4]: factors of latent, model output, history and noise.
    coefficients: Float32
    #: [steps]: the latent is multiplied by this before the UNet and the detector see it.
    input_scale: Float32
    #: The first latent is standard noise times this.
    init_noise_sigma: float


def make_schedule(info: SchedulerInfo, prediction_type: str, num_inference_steps: int) -> Schedule:
    """The schedule of the bundle's sampler.

    Raises:
        RequestError: the number of steps is not in 1..999, or the sampler or prediction type is not known here.
    """
    most = info.num_train_timesteps - 1
    if not 1 <= as_integer("num_inference_steps", num_inference_steps) <= most:
        raise RequestError(f"num_inference_steps is {num_inference_steps}; expected 1 to {most}")
    if info.kind != "ddim":
        raise RequestError(f"scheduler {info.kind!r} is not known to this version; known: ddim")
    return ddim(info, prediction_type, num_inference_steps)


def ddim(info: SchedulerInfo, prediction_type: str, num_inference_steps: int) -> Schedule:
    """DDIM without noise (Song et al. 2021, equation 12 with eta 0), in the form z' = c_z z + c_e e."""
    alphas = _alphas_cumprod(info)
    steps = _timesteps(info, num_inference_steps)
    previous = steps - info.num_train_timesteps // num_inference_steps
    final = 1.0 if info.set_alpha_to_one else alphas[0]
    alpha = alphas[steps]
    alpha_previous = np.where(previous >= 0, alphas[np.maximum(previous, 0)], final)
    sigma, sigma_previous = np.sqrt(1 - alpha), np.sqrt(1 - alpha_previous)
    ratio = np.sqrt(alpha_previous / alpha)
    if prediction_type == "epsilon":
        latent, model = ratio, sigma_previous - ratio * sigma
    elif prediction_type == "v_prediction":
        latent = np.sqrt(alpha_previous * alpha) + sigma_previous * sigma
        model = sigma_previous * np.sqrt(alpha) - np.sqrt(alpha_previous) * sigma
    else:
        raise RequestError(f"prediction type {prediction_type!r} is not known; expected epsilon or v_prediction")
    zeros = np.zeros_like(latent)
    return Schedule(
        timesteps=steps.astype(np.float32),
        coefficients=np.stack([latent, model, zeros, zeros], axis=1).astype(np.float32),
        input_scale=np.ones(num_inference_steps, np.float32),
        init_noise_sigma=1.0,
    )


def _alphas_cumprod(info: SchedulerInfo) -> Float64:
    # In single precision like diffusers, so that both draw the same picture.
    count = info.num_train_timesteps
    if info.beta_schedule == "scaled_linear":
        roots = np.linspace(np.sqrt(info.beta_start), np.sqrt(info.beta_end), count, dtype=np.float32)
        betas = roots**2
    elif info.beta_schedule == "linear":
        betas = np.linspace(info.beta_start, info.beta_end, count, dtype=np.float32)
    else:
        raise RequestError(f"beta schedule {info.beta_schedule!r} is not known; expected scaled_linear or linear")
    return np.cumprod(1 - betas, dtype=np.float32).astype(np.float64)


def _timesteps(info: SchedulerInfo, steps: int) -> npt.NDArray[np.int64]:
    total = info.num_train_timesteps
    if info.timestep_spacing == "leading":
        return np.arange(steps)[::-1] * (total // steps) + info.steps_offset
    if info.timestep_spacing == "trailing":
        return np.round(np.arange(total, 0, -total / steps)).astype(np.int64) - 1
    if info.timestep_spacing == "linspace":
        return np.linspace(0, total - 1, steps).round()[::-1].astype(np.int64)
    raise RequestError(f"timestep spacing {info.timestep_spacing!r} is not known")
