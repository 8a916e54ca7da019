"""The noise schedule of a model, and which of its timesteps a number of steps visits: diffusers' numbers, to the bit.

`alphas` are the cumulative signal shares of the training timesteps, `sigmas` noise over signal.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from saferedir.engines.errors import RequestError
from saferedir.engines.manifest import SchedulerInfo

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]

#: Signal share of the last timestep where its SNR is zero and a sampler divides by it.
NEARLY_ZERO = 2.0**-24
#: Of betas that follow a cosine.
HIGHEST_BETA = 0.999
#: How noise levels may be spaced, other than by timesteps.
KARRAS, EXPONENTIAL = "karras", "exponential"
#: Of the spacing of Karras et al. 2022, equation 5.
RHO = 7.0


def signal_shares(info: SchedulerInfo) -> Float64:
    """alphas [T] of the training timesteps, the last one zero where the betas are rescaled to zero terminal SNR.

    Raises:
        RequestError: the beta schedule is not known here.
    """
    betas = _betas(info)
    if info.rescale_betas_zero_snr:
        betas = _to_zero_snr(betas)
    return _cumulative(1 - betas).astype(np.float64)


def sigmas_of(info: SchedulerInfo) -> Float64:
    """sigmas [T] of the training timesteps, rising, rounded to single precision as diffusers' are."""
    alphas = signal_shares(info).astype(np.float32)
    if info.rescale_betas_zero_snr:
        alphas[-1] = NEARLY_ZERO
    return np.asarray(np.sqrt((1 - alphas) / alphas), np.float64)


def whole_timesteps(info: SchedulerInfo, steps: int) -> npt.NDArray[np.int64]:
    """The timesteps [steps] that are visited, falling.

    Raises:
        RequestError: the spacing is not known here, or cannot be done in that number of steps.
    """
    total = info.num_train_timesteps
    if info.timestep_spacing == "linspace":
        return np.linspace(0, total - 1, steps).round()[::-1].astype(np.int64)
    if info.timestep_spacing == "leading":
        return within(info, steps, np.arange(steps)[::-1] * (total // steps) + info.steps_offset)
    return trailing(info, steps)


def trailing(info: SchedulerInfo, steps: int) -> npt.NDArray[np.int64]:
    """As many timesteps as there are steps, counted down from the last one.

    Raises:
        RequestError: they cannot be had in that number of steps, or the spacing is not known here.
    """
    if info.timestep_spacing != "trailing":
        raise RequestError(f"timestep spacing {info.timestep_spacing!r} is not known; expected leading, trailing or linspace")
    total = info.num_train_timesteps
    return within(info, steps, np.round(np.arange(total, 0, -total / steps)).astype(np.int64) - 1)


def within(info: SchedulerInfo, steps: int, timesteps: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """`timesteps`, where they are as many as there are steps and all of training.

    Raises:
        RequestError: they are not. Rounding gives diffusers' trailing spacing one timestep too many for some numbers.
    """
    last = info.num_train_timesteps - 1
    if len(timesteps) != steps or timesteps.min() < 0 or timesteps.max() > last:
        raise RequestError(
            f"num_inference_steps is {steps}, for which timestep_spacing {info.timestep_spacing!r} with steps_offset "
            f"{info.steps_offset} gives {len(timesteps)} timesteps from {timesteps.max()} to {timesteps.min()}; expected "
            f"{steps} between {last} and 0: ask for another number of steps"
        )
    return timesteps


def noise_levels(info: SchedulerInfo, steps: int, spacing: str = "") -> tuple[Float64, Float64]:
    """The timesteps [steps], which need not be whole, and sigmas [steps + 1] that Euler's method visits.

    With a spacing the levels lie between those of the first and the last timestep that would be visited without.
    """
    training = sigmas_of(info)
    if info.timestep_spacing == "linspace":
        timesteps = np.linspace(0, info.num_train_timesteps - 1, steps, dtype=np.float32)[::-1].astype(np.float64)
    else:
        timesteps = whole_timesteps(info, steps).astype(np.float64)
    sigmas = np.interp(timesteps, np.arange(len(training)), training)
    if spacing:
        sigmas = _spaced(info, steps, spacing, sigmas[0], sigmas[-1])
        timesteps = _timesteps_of(sigmas, training)
    return timesteps, np.append(sigmas, _final(info, training))


def multistep_levels(info: SchedulerInfo, steps: int, spacing: str = "") -> tuple[Float64, Float64]:
    """The timesteps [steps], all whole, and sigmas [steps + 1] that DPM-Solver's multistep methods visit, which leave out the
    last timestep of one more step. With a spacing the levels lie between those of all of training.
    """
    training = sigmas_of(info)
    last = _final(info, training)
    if spacing:
        sigmas = _spaced(info, steps, spacing, training[-1], training[0])
        timesteps = _timesteps_of(sigmas, training)
        if spacing == KARRAS and info.beta_schedule != "squaredcos_cap_v2":
            timesteps = timesteps.round()
        return np.trunc(timesteps), np.append(sigmas, last)
    total = info.num_train_timesteps
    if info.timestep_spacing == "linspace":
        whole = np.linspace(0, total - 1, steps + 1).round()[::-1][:-1].astype(np.int64)
    elif info.timestep_spacing == "leading":
        whole = within(info, steps, np.arange(1, steps + 1)[::-1] * (total // (steps + 1)) + info.steps_offset)
    else:
        whole = trailing(info, steps)
    return whole.astype(np.float64), np.append(training[whole], last)


def _final(info: SchedulerInfo, training: Float64) -> float:
    """The level that the last step ends at."""
    return float(training[0]) if info.final_sigmas_type == "sigma_min" else 0.0


def _spaced(info: SchedulerInfo, steps: int, spacing: str, high: float, low: float) -> Float64:
    """sigmas [steps] from `high` to `low`, or between the bounds that the bundle states."""
    high = high if info.sigma_max is None else info.sigma_max
    low = low if info.sigma_min is None else info.sigma_min
    return _karras(high, low, steps) if spacing == KARRAS else _exponential(high, low, steps)


def _timesteps_of(sigmas: Float64, training: Float64) -> Float64:
    """Where `sigmas` lie among those of training, by their logarithms. As diffusers computes it, in whose single precision a
    whole timestep may come out just below."""
    levels, wanted = np.log(training.astype(np.float32)), np.log(np.maximum(sigmas, 1e-10))
    # The last one below, also where levels do not rise throughout, as those of a cosine of zero SNR.
    below = np.cumsum(wanted >= levels[:, None], axis=0).argmax(axis=0).clip(max=len(levels) - 2)
    share = np.clip((levels[below] - wanted) / (levels[below] - levels[below + 1]), 0, 1)
    return np.asarray((1 - share) * below + share * (below + 1))


def _karras(high: float, low: float, steps: int) -> Float64:
    """Karras et al. 2022, equation 5."""
    first, last = high ** (1 / RHO), low ** (1 / RHO)
    return np.asarray((first + np.linspace(0, 1, steps) * (last - first)) ** RHO)


def _exponential(high: float, low: float, steps: int) -> Float64:
    return np.asarray(np.exp(np.linspace(math.log(high), math.log(low), steps)))


def _betas(info: SchedulerInfo) -> Float32:
    count = info.num_train_timesteps
    if info.beta_schedule == "scaled_linear":
        return _line(info.beta_start**0.5, info.beta_end**0.5, count) ** 2
    if info.beta_schedule == "linear":
        return _line(info.beta_start, info.beta_end, count)
    if info.beta_schedule == "squaredcos_cap_v2":
        shares = [math.cos((step / count + 0.008) / 1.008 * math.pi / 2) ** 2 for step in range(count + 1)]
        betas = [min(1 - after / before, HIGHEST_BETA) for before, after in pairwise(shares)]
        return np.array(betas, np.float32)
    raise RequestError(
        f"beta schedule {info.beta_schedule!r} is not known; expected scaled_linear, linear or squaredcos_cap_v2"
    )


def _line(start: float, end: float, count: int) -> Float32:
    """`torch.linspace` in single precision, which counts from both ends and rounds once a value."""
    first, last = np.float32(start), np.float32(end)
    step, index = np.float64((last - first) / np.float32(count - 1)), np.arange(count)
    return np.where(index < count // 2, first + step * index, last - step * (count - 1 - index)).astype(np.float32)


def _cumulative(factors: npt.NDArray[Any]) -> Float32:
    """`torch.cumprod`, which multiplies in double precision."""
    return np.cumprod(factors.astype(np.float64)).astype(np.float32)


def _to_zero_snr(betas: Float32) -> Float32:
    """Betas of which the last signal share is zero (Lin et al. 2023, algorithm 1)."""
    roots = np.sqrt(_cumulative(1 - betas))
    first, last = roots[0], roots[-1]
    shares = ((roots - last) * (first / (first - last))) ** 2
    return np.asarray(1 - np.append(shares[:1], shares[1:] / shares[:-1]))
