"""Schedulers as tables: every step is one linear map, so the loop and the fused graph need no branches.

    z' = c_latent z + c_model e + c_history h + c_noise n

with e the model's (guided) output, h that of the step before, and n noise of the step's own. A scheduler is a function from
the noise schedule (`noise_levels.py`) and the number of steps to the coefficients; adding one touches this file alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from saferedir.engines.errors import RequestError
from saferedir.engines.manifest import SchedulerInfo
from saferedir.runtime.noise_levels import (
    Float32,
    Float64,
    noise_levels,
    sigmas_of,
    signal_shares,
    trailing,
    whole_timesteps,
    within,
)
from saferedir.runtime.request import as_integer

#: dpm-solver takes its last step of first order where there are fewer steps than this.
LOWER_ORDER_FINAL = 15
#: Of the boundary condition of consistency models.
SIGMA_DATA = 0.5


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


def make_schedule(info: SchedulerInfo, prediction_type: str, num_inference_steps: int, kind: str | None = None) -> Schedule:
    """The schedule of the bundle's sampler, or of another `kind` of sampler over the same noise schedule.

    Raises:
        RequestError: the number of steps is not one that sampler and spacing allow, or sampler or prediction type are not
            known here.
    """
    kind = info.kind if kind is None else kind
    most = info.num_train_timesteps - 1
    if not 1 <= as_integer("num_inference_steps", num_inference_steps) <= most:
        raise RequestError(f"num_inference_steps is {num_inference_steps}; expected 1 to {most}")
    if kind not in SCHEDULERS:
        raise RequestError(f"scheduler {kind!r} is not known to this version; known: {', '.join(SCHEDULERS)}")
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        schedule = SCHEDULERS[kind](info, prediction_type, num_inference_steps)
    if not all(np.isfinite(part).all() for part in (schedule.coefficients, schedule.timesteps, schedule.init_noise_sigma)):
        raise RequestError(
            f"num_inference_steps is {num_inference_steps}, for which {kind} with {prediction_type} divides by a signal or "
            "noise of zero; ask for another number of steps or another sampler"
        )
    return schedule


def ddim(info: SchedulerInfo, prediction_type: str, num_inference_steps: int) -> Schedule:
    """DDIM without noise (Song et al. 2021, equation 12 with eta 0), in the form z' = c_z z + c_e e."""
    alphas = signal_shares(info)
    steps = whole_timesteps(info, num_inference_steps)
    previous = steps - info.num_train_timesteps // num_inference_steps
    final = 1.0 if info.set_alpha_to_one else alphas[0]
    alpha = alphas[steps]
    alpha_previous = np.where(previous >= 0, alphas[np.maximum(previous, 0)], final)
    sigma, sigma_previous = np.sqrt(1 - alpha), np.sqrt(1 - alpha_previous)
    if prediction_type == "epsilon":
        ratio = np.sqrt(alpha_previous / alpha)
        latent, model = ratio, sigma_previous - ratio * sigma
    elif prediction_type == "v_prediction":
        latent = np.sqrt(alpha_previous * alpha) + sigma_previous * sigma
        model = sigma_previous * np.sqrt(alpha) - np.sqrt(alpha_previous) * sigma
    else:
        raise _unknown_prediction(prediction_type)
    return _schedule(steps, latent, model)


def euler(info: SchedulerInfo, prediction_type: str, num_inference_steps: int) -> Schedule:
    """Euler steps of the probability flow (Karras et al. 2022, algorithm 2 without churn); latents have variance s^2 + 1."""
    steps, sigmas = noise_levels(info, num_inference_steps)
    sigma, change = sigmas[:-1], np.diff(sigmas)
    if prediction_type == "epsilon":
        latent, model = np.ones_like(sigma), change
    elif prediction_type == "v_prediction":
        # The derivative is (z - x0) / s with x0 = z / (s^2 + 1) - v s / sqrt(s^2 + 1).
        latent = 1 + change * sigma / (sigma**2 + 1)
        model = change / np.sqrt(sigma**2 + 1)
    else:
        raise _unknown_prediction(prediction_type)
    highest = float(sigmas.max())
    start = highest if info.timestep_spacing in ("linspace", "trailing") else math.sqrt(highest**2 + 1)
    return _schedule(steps, latent, model, input_scale=1 / np.sqrt(sigma**2 + 1), init_noise_sigma=start)


def dpm_solver(info: SchedulerInfo, prediction_type: str, num_inference_steps: int) -> Schedule:
    """DPM-Solver-2, multistep, on noise predictions (Lu et al. 2022, section 3.3 of the multistep variant): history is the
    output of the step before. The first step is of first order, the last one too where there are fewer than 15."""
    if prediction_type != "epsilon":
        raise RequestError(f"dpm-solver needs a model that predicts noise; this one's prediction type is {prediction_type}")
    if info.use_karras_sigmas or info.use_exponential_sigmas:
        raise RequestError("dpm-solver visits noise levels by timesteps, this model's are spaced otherwise; take euler")
    count, total = num_inference_steps, info.num_train_timesteps
    if info.timestep_spacing == "linspace":
        steps = np.linspace(0, total - 1, count + 1).round()[::-1][:-1].astype(np.int64)
    elif info.timestep_spacing == "leading":
        steps = within(info, count, np.arange(1, count + 1)[::-1] * (total // (count + 1)) + info.steps_offset)
    else:
        steps = trailing(info, count)
    sigmas = sigmas_of(info)
    every = np.append(sigmas[steps], sigmas[0])
    alpha = 1 / np.sqrt(every**2 + 1)
    noise, lam = every * alpha, -np.log(every)  # half the log of the signal-to-noise ratio
    ahead = lam[1:] - lam[:-1]
    growth = noise[1:] * np.expm1(ahead)
    share = np.zeros(count)  # of the change since the step before, half of h over the step before's h
    share[1:] = ahead[1:] / (2 * ahead[:-1])
    if count < LOWER_ORDER_FINAL:
        share[-1] = 0
    return _schedule(steps, alpha[1:] / alpha[:-1], -growth * (1 + share), history=growth * share)


def lcm(info: SchedulerInfo, prediction_type: str, num_inference_steps: int) -> Schedule:
    """Multistep sampling of a latent consistency model (Luo et al. 2023, algorithm 3): fresh noise in all but the last step."""
    most, total = info.original_inference_steps, info.num_train_timesteps
    if not num_inference_steps <= most <= total:
        raise RequestError(f"num_inference_steps is {num_inference_steps}; lcm was distilled for at most {most} of {total}")
    distilled = np.arange(1, most + 1) * (total // most) - 1
    steps = distilled[::-1][np.floor(np.linspace(0, len(distilled), num_inference_steps, endpoint=False)).astype(np.int64)]
    alphas = signal_shares(info)
    alpha, sigma = np.sqrt(alphas[steps]), np.sqrt(1 - alphas[steps])
    scaled = steps * info.timestep_scaling
    skip, out = SIGMA_DATA**2 / (scaled**2 + SIGMA_DATA**2), scaled / np.sqrt(scaled**2 + SIGMA_DATA**2)
    if prediction_type == "epsilon":
        latent, model = skip + out / alpha, -out * sigma / alpha
    elif prediction_type == "v_prediction":
        latent, model = skip + out * alpha, -out * sigma
    else:
        raise _unknown_prediction(prediction_type)
    kept, fresh = np.append(alpha[1:], 1), np.append(sigma[1:], 0)
    return _schedule(steps, kept * latent, kept * model, noise=fresh)


Scheduler = Callable[[SchedulerInfo, str, int], Schedule]
SCHEDULERS: dict[str, Scheduler] = {"ddim": ddim, "euler": euler, "dpm-solver": dpm_solver, "lcm": lcm}


def _schedule(
    steps: npt.NDArray[Any],
    latent: Float64,
    model: Float64,
    *,
    history: Float64 | None = None,
    noise: Float64 | None = None,
    input_scale: Float64 | None = None,
    init_noise_sigma: float = 1.0,
) -> Schedule:
    zeros = np.zeros_like(latent)
    columns = [latent, model, zeros if history is None else history, zeros if noise is None else noise]
    return Schedule(
        timesteps=steps.astype(np.float32),
        coefficients=np.stack(columns, axis=1).astype(np.float32),
        input_scale=np.ones(len(steps), np.float32) if input_scale is None else input_scale.astype(np.float32),
        init_noise_sigma=init_noise_sigma,
    )


def _unknown_prediction(prediction_type: str) -> RequestError:
    return RequestError(f"prediction type {prediction_type!r} is not known; expected epsilon or v_prediction")
