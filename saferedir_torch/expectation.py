"""The picture to be expected of a latent: the estimate of the clean latent z0 that a denoising step moves towards.

It shows what will be drawn many steps before the noisy latent does. z = sqrt(a) z0 + sqrt(1 - a) e, with a the cumulative
signal share of the timestep and e the noise (Song et al. 2021, equations 4 and 9).
"""

from __future__ import annotations

import torch
from torch import Tensor

#: Scaled latents of pictures lie nearer to 0 than this; early estimates of them need not.
FARTHEST = 6.0


def expected_of_prediction(latent: Tensor, timestep: Tensor, prediction: Tensor, alphas: Tensor, *, velocity: bool) -> Tensor:
    """Of a latent and what the model predicted in the step before, both [B, C, h, w], timestep [B] -> [B, C, h, w].

    `alphas` [1000] are the cumulative signal shares; `velocity` says that the model predicts v, not noise. Zero where the
    prediction is, as before the first step.
    """
    signal, noise = _shares(alphas, timestep)
    clean = signal * latent - noise * prediction if velocity else (latent - noise * prediction) / signal
    known = prediction.abs().flatten(1).amax(dim=1) > 0
    return torch.where(known[:, None, None, None], clean.clamp(-FARTHEST, FARTHEST), torch.zeros_like(clean))


def noise_beside(clean: Tensor, latent: Tensor, timestep: Tensor, alphas: Tensor) -> Tensor:
    """The noise that a latent holds beside a clean one, both [B, C, h, w], timestep [B] -> [B, C, h, w].

    As a prediction of noise it tells that clean latent: what is to be expected under a sampler that adds fresh noise to it.
    """
    signal, noise = _shares(alphas, timestep)
    return (latent - signal * clean) / noise


def expected_of_latents(before: Tensor, time_before: Tensor, latent: Tensor, timestep: Tensor, alphas: Tensor) -> Tensor:
    """Of recorded latents [B, C, h, w] and those of the step before, with their timesteps [B] -> [B, C, h, w].

    DDIM goes from one to the next with the same z0 and e, so that the two tell both.
    """
    (signal_before, noise_before), (signal, noise) = _shares(alphas, time_before), _shares(alphas, timestep)
    clean = (latent * noise_before - before * noise) / (signal * noise_before - signal_before * noise)
    return clean.clamp(-FARTHEST, FARTHEST)


def expected_in_runs(latents: Tensor, timesteps: Tensor, alphas: Tensor) -> Tensor:
    """Of every step of recorded runs, latents [R, S, C, h, w] of timesteps [S] -> [R, S, C, h, w]; zero before the first."""
    latents = latents.float()
    runs, steps = latents.shape[:2]
    before, after = (times.repeat(runs) for times in (timesteps[:-1], timesteps[1:]))
    later = expected_of_latents(latents[:, :-1].flatten(0, 1), before, latents[:, 1:].flatten(0, 1), after, alphas)
    return torch.cat([torch.zeros_like(latents[:, :1]), later.view(runs, steps - 1, *latents.shape[2:])], dim=1)


def _shares(alphas: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
    """sqrt(a) and sqrt(1 - a) at timesteps [B], to the nearest whole one, [B, 1, 1, 1] each."""
    # Neither by `round` nor by plain indexing, which ONNX Runtime has no CUDA kernels for.
    nearest = (timestep + 0.5).clamp(0, len(alphas) - 1).long()
    alpha = alphas.index_select(0, nearest)[:, None, None, None]
    return alpha.sqrt(), (1 - alpha).sqrt()
