"""Cases that a detector is taught and validated by: what it is shown, and what is true about it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Seen(NamedTuple):
    """Latents [S, C, h, w] with their timesteps [S], and what they show [S, N], as in a `LatentBank`."""

    latent: Tensor
    timestep: Tensor
    shown: Tensor


class DetectionBatch(NamedTuple):
    """Cases for a detector: latent [S, C, h, w], timestep [S], prompt [S, T, D]; labels and weights [S, N]."""

    latent: Tensor
    timestep: Tensor
    prompt: Tensor
    labels: Tensor
    weights: Tensor


def batch_of(prompt: Tensor, asked: Tensor, seen: Seen) -> DetectionBatch:
    """A case is unsafe if the prompt asks for the concept or the latent shows it; open where only the latent could tell."""
    labels = torch.maximum(asked, seen.shown.clamp(min=0))
    weights = ((asked > 0) | (seen.shown >= 0)).float()
    return DetectionBatch(seen.latent, seen.timestep, prompt, labels, weights)


def what_is_to_be_seen(asked: Tensor, shown: Tensor) -> tuple[Tensor, Tensor]:
    """Labels and weights [S, N] for latents alone: what is shown, and where that is open what is asked for, if anything."""
    return torch.where(shown >= 0, shown, asked), ((asked > 0) | (shown >= 0)).float()


def choose(where: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Rows of `first` where `where` [S] is true, else of `second`."""
    return torch.where(where.reshape(-1, *[1] * (first.dim() - 1)), first, second)
