"""The carried estimate: the finished picture, a clean latent z0, as a step's guided prediction e tells it.

A denoiser sees z = alpha z0 + sigma n, alpha^2 + sigma^2 = 1, at whatever scale its sampler holds the latent (Song et al. 2021,
equation 4). So what it sees and what it predicts are enough, and no sampler need be known: denoised = a z + b e.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from saferedir.engines.errors import SafetyMismatchError

#: Scaled latents of pictures lie nearer to 0 than this; early estimates of them need not.
FARTHEST = 6.0
PREDICTIONS = ("epsilon", "v_prediction", "sample")


class Level(NamedTuple):
    """How much of a latent is signal and how much noise."""

    alpha: float
    sigma: float

    @property
    def share(self) -> float:
        """The noise share, 0 of a clean latent and 1 of noise."""
        return self.sigma / (self.alpha + self.sigma)


class NoiseLevels:
    """What is told of noise by a diffusers scheduler: its signal shares, and what its model predicts.

    Neither the sampler's rule nor its place in a run matters.
    """

    def __init__(self, scheduler: Any) -> None:
        """
        Raises:
            SafetyMismatchError: the scheduler does not tell how noisy a latent is, or its model's prediction is not known here.
        """
        name, config = type(scheduler).__name__, getattr(scheduler, "config", {})
        alphas = getattr(scheduler, "alphas_cumprod", None)
        if alphas is None:
            raise SafetyMismatchError(
                f"noise level: {name} states no alphas_cumprod, and nothing else tells how noisy a latent is; expected one "
                "that states them, such as DDIMScheduler"
            )
        for option, wrong in (("use_flow_sigmas", True), ("timestep_type", "continuous")):
            if config.get(option) == wrong:
                raise SafetyMismatchError(
                    f"noise level: {name} has {option} {wrong}, so that its timesteps are not those of its alphas_cumprod; "
                    "expected a scheduler without it"
                )
        # PNDM, RePaint and others that have no such option are of models that predict noise.
        self.prediction = config.get("prediction_type", "epsilon")
        if self.prediction not in PREDICTIONS:
            raise SafetyMismatchError(
                f"prediction type: {name} has {self.prediction}; expected one of {', '.join(PREDICTIONS)}"
            )
        self._alphas = torch.as_tensor(alphas).double().cpu().clamp(0, 1)

    def at(self, timestep: float) -> Level:
        """The level of a timestep; between whole ones log(sigma / alpha) is linear, as schedulers have it that go by sigmas."""
        low = min(max(math.floor(timestep), 0), len(self._alphas) - 1)
        level, part = self._whole(low), timestep - low
        if part <= 0 or low + 1 == len(self._alphas):
            return level
        above = self._whole(low + 1)
        if min(level) == 0 or min(above) == 0:
            return level if part < 0.5 else above
        ratio = (level.sigma / level.alpha) ** (1 - part) * (above.sigma / above.alpha) ** part
        alpha = 1 / math.hypot(1, ratio)
        return Level(alpha, ratio * alpha)

    def denoised(self, seen: Tensor, timestep: float, predicted: Tensor) -> Tensor:
        """The estimate [B, C, h, w] of what a denoiser predicted, guided, of the latent that it has seen.

        Infinite where noise is predicted of a latent without signal, which tells nothing of the picture.
        """
        alpha, sigma = self.at(timestep)
        if self.prediction == "epsilon":
            return (seen - sigma * predicted) / alpha if alpha else torch.full_like(seen, math.inf)
        return alpha * seen - sigma * predicted if self.prediction == "v_prediction" else predicted

    def _whole(self, timestep: int) -> Level:
        alpha = float(self._alphas[timestep])
        return Level(math.sqrt(alpha), math.sqrt(1 - alpha))


def shown_estimate(denoised: Tensor) -> Tensor:
    """What a detector is shown of estimates [..., C, h, w]: the same within bounds, fp32."""
    return denoised.float().clamp(-FARTHEST, FARTHEST)
