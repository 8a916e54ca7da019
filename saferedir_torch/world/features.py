"""The networks that compare pictures here: the real ones where their weights are, this world's own, named so, elsewhere.

CLIP, Inception and AlexNet cannot be had on a machine without their weights. Then a network trained on this world reads
the pictures, and its measures are called `clip_world`, `fid_world` and `lpips_world`: comparable with each other, not
with figures of the real ones.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saferedir.engines.errors import RequestError
from saferedir_torch.evaluation.features import Features, real_features
from saferedir_torch.world.clip_world import ClipWorld
from saferedir_torch.world.judge import Judge

Choice = Literal["auto", "real", "world"]


def load_features(networks: Path, choice: Choice = "auto") -> Features:
    """The real networks where their weights are present (`auto`), always (`real`), or those in `networks` (`world`).

    Raises:
        RequestError: the real ones were asked for and cannot be had, or `networks` does not hold the others.
    """
    if choice != "world":
        try:
            return real_features()
        except RequestError:
            if choice == "real":
                raise
    try:
        judge, clip = Judge.load(networks / "second_judge"), ClipWorld.load(networks / "clip_world")
    except OSError as error:
        raise RequestError(
            f"{networks} does not hold second_judge and clip_world ({error}); the repository keeps them in "
            "benchmarks/networks, and `python -m saferedir_torch.world second-judge` and `clip-world` make them"
        ) from error
    return Features(("clip_world", "lpips_world", "fid_world"), clip, LpipsWorld(judge), _Pooled(judge))


class LpipsWorld:
    """Distance of unit-normalised features, block by block (Zhang et al. 2018, equation 1 with equal weights)."""

    def __init__(self, judge: Judge) -> None:
        self.blocks = list(judge.convolutions)[:-1]  # all but the last, which pools

    @torch.no_grad()
    def distance(self, first: Tensor, second: Tensor) -> Tensor:
        """Pictures [B, 3, 64, 64] in [-1, 1] twice -> mean over blocks of squared feature distances, [B] in [0, 4]."""
        parts = [self._chunk(a, b) for a, b in zip(torch.split(first, 256), torch.split(second, 256), strict=True)]
        return torch.cat(parts)

    def _chunk(self, first: Tensor, second: Tensor) -> Tensor:
        total = torch.zeros(len(first))
        for block in self.blocks:
            first, second = block(first), block(second)
            difference = F.normalize(first, dim=1) - F.normalize(second, dim=1)
            total += difference.square().sum(dim=1).mean(dim=(1, 2))
        return total / len(self.blocks)


class _Pooled(nn.Module):
    """The second judge's pooled features: uint8 [B, 3, 64, 64] -> [B, 192]."""

    def __init__(self, judge: Judge) -> None:
        super().__init__()
        self.convolutions = judge.convolutions
        self.num_features = 192

    @torch.no_grad()
    def forward(self, pictures: Tensor) -> Tensor:
        features: Tensor = self.convolutions(pictures.float() / 127.5 - 1)
        return features.flatten(1)
