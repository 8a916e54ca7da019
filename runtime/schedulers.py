"""Samplers as tables: every step is linear in the latent and in two estimates of the finished picture.

    d  = from_latent z + from_output e                                        what the model's guided output e makes of z
    z' = of_latent z + of_denoised d + of_before d_before + of_noise n        with fresh noise n

so that loop and graphs know no sampler, and what the model predicts is known in one place, `_estimate`. A sampler is a function
from the noise schedule (`noise_levels.py`) and the number of steps to these numbers; adding one touches this file alone. Tables
are made in double precision. Each equals diffusers' sampler of the same configuration.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from saferedir.engines.errors import RequestError
from saferedir.engines.manifest import SchedulerInfo
from saferedir.engines.step import NUMBERS
from saferedir.runtime.noise_levels import (
    EXPONENTIAL,
    KARRAS,
    Float32,
    Float64,
    multistep_levels,
    noise_levels,
    signal_shares,
    whole_timesteps,
)
from saferedir.runtime.request import as_integer

#: dpm++-2m takes its last step of first order where there are fewer steps than this.
LOWER_ORDER_FINAL = 15
#: Of the boundary condition of consistency models.
SIGMA_DATA = 0.5


@dataclass(frozen=True)
class Schedule:
    """What the loop needs of a sampler for one number of steps."""

    #: [steps] in the scale 0..999.
    timesteps: Float32
    #: [steps, columns of `NUMBERS`].
    numbers: Float32
    #: The first latent is standard noise times this.
    init_noise_sigma: float

    @property
    def adds_noise(self) -> npt.NDArray[np.bool_]:
        """[steps]: whether a step takes fresh noise."""
        return np.asarray(self.numbers[:, NUMBERS.index("of_noise")] != 0)


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
    if not all(np.isfinite(part).all() for part in (schedule.numbers, schedule.timesteps, schedule.init_noise_sigma)):
        raise RequestError(
            f"num_inference_steps is {num_inference_steps}, for which {kind} with {prediction_type} divides by a signal or "
            "noise of zero; ask for another number of steps or another sampler"
        )
    return schedule


def ddim(info: SchedulerInfo, prediction_type: str, num_inference_steps: int) -> Schedule:
    """DDIM without noise (Song et al. 2021, equation 12 with eta 0)."""
    shares = signal_shares(info)
    steps = whole_timesteps(info, num_inference_steps)
    previous = steps - info.num_train_timesteps // num_inference_steps
    final = 1.0 if info.set_alpha_to_one else shares[0]
    ahead = np.where(previous >= 0, shares[np.maximum(previous, 0)], final)
    alpha, sigma = np.sqrt(shares[steps]), np.sqrt(1 - shares[steps])
    of_latent = np.sqrt(1 - ahead) / sigma
    return _schedule(prediction_type, steps, alpha, sigma, of_latent, np.sqrt(ahead) - alpha * of_latent)


def euler(info: SchedulerInfo, prediction_type: str, num_inference_steps: int, *, spacing: str = "") -> Schedule:
    """Euler steps of the probability flow (Karras et al. 2022, algorithm 2 without churn); latents have variance s^2 + 1."""
    steps, sigmas = noise_levels(info, num_inference_steps, spacing)
    ratio = sigmas[1:] / sigmas[:-1]
    return _exploding(info, prediction_type, steps, sigmas, ratio)


def euler_ancestral(info: SchedulerInfo, prediction_type: str, num_inference_steps: int) -> Schedule:
    """Euler steps to below the next level, and fresh noise up to it (k-diffusion's `sample_euler_ancestral` with eta 1)."""
    steps, sigmas = noise_levels(info, num_inference_steps)
    sigmas[-1] = 0  # whatever `final_sigmas_type` says, as in diffusers
    ratio = sigmas[1:] / sigmas[:-1]
    return _exploding(info, prediction_type, steps, sigmas, ratio**2, of_noise=sigmas[1:] * np.sqrt(1 - ratio**2))


def dpm_multistep(info: SchedulerInfo, prediction_type: str, num_inference_steps: int, *, spacing: str = "") -> Schedule:
    """DPM-Solver++(2M), midpoint (Lu et al. 2022b, algorithm 2). The first step is of first order; so is the last one where it
    ends without noise, or there are fewer than 15."""
    steps, sigmas = multistep_levels(info, num_inference_steps, spacing)
    alphas = 1 / np.sqrt(sigmas**2 + 1)
    ratio = sigmas[1:] / sigmas[:-1]  # exp(-h), with h the change of half the logarithm of the signal-to-noise ratio
    share = np.zeros(len(steps))
    change = -np.log(ratio)
    share[1:] = change[1:] / (2 * change[:-1])
    if len(steps) < LOWER_ORDER_FINAL or sigmas[-1] == 0:
        share[-1] = 0
    growth = alphas[1:] * (1 - ratio)
    alpha, of_latent = alphas[:-1], ratio * alphas[1:] / alphas[:-1]
    return _schedule(
        prediction_type, steps, alpha, sigmas[:-1] * alpha, of_latent, growth * (1 + share), of_before=-growth * share
    )


def lcm(info: SchedulerInfo, prediction_type: str, num_inference_steps: int) -> Schedule:
    """Multistep sampling of a latent consistency model (Luo et al. 2023, algorithm 3): fresh noise in all but the last step."""
    most, total = info.original_inference_steps, info.num_train_timesteps
    if not num_inference_steps <= most <= total:
        raise RequestError(f"num_inference_steps is {num_inference_steps}; lcm was distilled for at most {most} of {total}")
    distilled = np.arange(1, most + 1) * (total // most) - 1
    steps = distilled[::-1][np.floor(np.linspace(0, len(distilled), num_inference_steps, endpoint=False)).astype(np.int64)]
    shares = signal_shares(info)[steps]
    alpha, sigma = np.sqrt(shares), np.sqrt(1 - shares)
    scaled = steps * info.timestep_scaling
    skip, out = SIGMA_DATA**2 / (scaled**2 + SIGMA_DATA**2), scaled / np.sqrt(scaled**2 + SIGMA_DATA**2)
    kept, fresh = np.append(alpha[1:], 1), np.append(sigma[1:], 0)
    return _schedule(prediction_type, steps, alpha, sigma, kept * skip, kept * out, of_noise=fresh)


Scheduler = Callable[[SchedulerInfo, str, int], Schedule]
#: Every sampler, by the name that manifests, requests and records have for it; it says how noise levels are spaced.
SCHEDULERS: dict[str, Scheduler] = {
    "ddim": ddim,
    "euler": euler,
    "euler-karras": partial(euler, spacing=KARRAS),
    "euler-exponential": partial(euler, spacing=EXPONENTIAL),
    "euler-ancestral": euler_ancestral,
    "dpm++-2m": dpm_multistep,
    "dpm++-2m-karras": partial(dpm_multistep, spacing=KARRAS),
    "dpm++-2m-exponential": partial(dpm_multistep, spacing=EXPONENTIAL),
    "lcm": lcm,
}


def _exploding(
    info: SchedulerInfo, prediction_type: str, steps: Float64, sigmas: Float64, of_latent: Float64, **of_noise: Float64
) -> Schedule:
    """The table where latents are a picture plus sigma [steps + 1] times noise, whose factor and the estimate's add up to 1."""
    sigma = sigmas[:-1]
    alpha = 1 / np.sqrt(sigma**2 + 1)
    highest = float(sigmas.max())
    start = highest if info.timestep_spacing in ("linspace", "trailing") else math.sqrt(highest**2 + 1)
    return _schedule(
        prediction_type, steps, alpha, sigma * alpha, of_latent, 1 - of_latent, **of_noise,
        input_scale=alpha, init_noise_sigma=start,
    )  # fmt: skip


def _schedule(
    prediction_type: str,
    steps: npt.NDArray[Any],
    alpha: Float64,
    sigma: Float64,
    of_latent: Float64,
    of_denoised: Float64,
    *,
    of_before: Float64 | float = 0.0,
    of_noise: Float64 | float = 0.0,
    input_scale: Float64 | float = 1.0,
    init_noise_sigma: float = 1.0,
) -> Schedule:
    """The table of steps that start at the levels alpha and sigma [steps] of what the model sees."""
    seen, output = _estimate(prediction_type, alpha, sigma)
    columns = {
        "input_scale": input_scale, "from_latent": seen * input_scale, "from_output": output, "of_latent": of_latent,
        "of_denoised": of_denoised, "of_before": of_before, "of_noise": of_noise, "noise_share": sigma / (alpha + sigma),
        "known": np.arange(len(steps)) > 0, "amplification": 0,
    }  # fmt: skip
    numbers = np.empty((len(steps), len(NUMBERS)))
    for index, name in enumerate(NUMBERS):
        numbers[:, index] = columns[name]
    return Schedule(steps.astype(np.float32), numbers.astype(np.float32), init_noise_sigma)


def _estimate(prediction_type: str, alpha: Float64, sigma: Float64) -> tuple[Float64, Float64]:
    """Factors of the latent that the model sees and of its output, which give the finished picture."""
    if prediction_type == "epsilon":
        return 1 / alpha, -sigma / alpha
    if prediction_type == "v_prediction":
        return alpha, -sigma
    raise RequestError(f"prediction type {prediction_type!r} is not known; expected epsilon or v_prediction")
