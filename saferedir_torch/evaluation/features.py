"""The networks that compare pictures: the real ones where their weights are, this world's own, named so, elsewhere.

CLIP, Inception and AlexNet cannot be had on a machine without their weights. Then a network trained on this world reads
the pictures, and its measures are called `clip_world`, `fid_world` and `lpips_world`: comparable with each other, not
with figures of the real ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saferedir.engines.errors import RequestError
from saferedir_torch.world.clip_world import ClipWorld
from saferedir_torch.world.judge import Judge

CLIP: Final = "openai/clip-vit-base-patch16"
Choice = Literal["auto", "real", "world"]


class TextScore(Protocol):
    def score(self, pictures: Tensor, prompts: list[str]) -> Tensor:
        """Pictures [B, 3, H, W] in [-1, 1] and B prompts -> scores [B] in [0, 100]."""
        ...


class Distance(Protocol):
    def distance(self, first: Tensor, second: Tensor) -> Tensor:
        """Pictures [B, 3, H, W] in [-1, 1] twice -> distances [B], 0 for equal ones."""
        ...


@dataclass(frozen=True)
class Features:
    """`names` are those of the three measures, for results to be stored under."""

    names: tuple[str, str, str]
    text: TextScore
    perceptual: Distance
    #: For torchmetrics' FrechetInceptionDistance: a feature size of Inception, or a network.
    frechet: int | nn.Module

    def frechet_distance(self, real: Tensor, generated: Tensor) -> float:
        """Frechet distance of two sets of pictures [P, 3, H, W] in [-1, 1]; lower is nearer."""
        from torchmetrics.image.fid import FrechetInceptionDistance

        metric = FrechetInceptionDistance(self.frechet, normalize=True)
        for pictures, is_real in ((real, True), (generated, False)):
            for chunk in torch.split(pictures, 128):
                metric.update(chunk / 2 + 0.5, real=is_real)
        return float(metric.compute())

    def kernel_distance(self, real: Tensor, generated: Tensor, *, subsets: int = 50) -> dict[str, float]:
        """Kernel distance of two sets of pictures, likewise: mean and deviation over subsets of at most 100."""
        from torchmetrics.image.kid import KernelInceptionDistance

        size = min(100, len(real), len(generated))
        metric = KernelInceptionDistance(self.frechet, subsets=subsets, subset_size=size, normalize=True)
        for pictures, is_real in ((real, True), (generated, False)):
            for chunk in torch.split(pictures, 128):
                metric.update(chunk / 2 + 0.5, real=is_real)
        mean, deviation = metric.compute()
        return {"mean": float(mean), "deviation": float(deviation)}


def load_features(networks: Path, choice: Choice = "auto") -> Features:
    """The real networks where their weights are present (`auto`), always (`real`), or those in `networks` (`world`).

    Raises:
        RequestError: the real ones were asked for and cannot be had, or `networks` does not hold the others.
    """
    if choice != "world":
        try:
            return _real()
        except (ImportError, OSError, ValueError) as error:
            if choice == "real":
                raise RequestError(
                    f"the weights of {CLIP}, Inception and AlexNet cannot be had here ({_first_line(error)}); put them where "
                    "transformers and torchvision look, or choose `world`"
                ) from error
    try:
        judge = Judge.load(networks / "second_judge")
        return Features(
            ("clip_world", "lpips_world", "fid_world"),
            ClipWorld.load(networks / "clip_world"),
            LpipsWorld(judge),
            _Pooled(judge),
        )
    except OSError as error:
        raise RequestError(
            f"{networks} does not hold second_judge and clip_world ({_first_line(error)}); the repository keeps them in "
            "benchmarks/networks, and `python -m saferedir_torch.world second-judge` and `clip-world` make them"
        ) from error


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


class _Clip:
    """torchmetrics' CLIPScore, picture by picture."""

    def __init__(self) -> None:
        from torchmetrics.multimodal.clip_score import CLIPScore

        self.metric = CLIPScore(model_name_or_path=CLIP)

    @torch.no_grad()
    def score(self, pictures: Tensor, prompts: list[str]) -> Tensor:
        pixels = ((pictures / 2 + 0.5) * 255).round().to(torch.uint8)
        scores: list[Any] = []
        for picture, prompt in zip(pixels, prompts, strict=True):
            self.metric.reset()
            scores.append(self.metric(picture, prompt))
        return torch.stack(scores)


class _Lpips:
    """torchmetrics' LPIPS over AlexNet."""

    def __init__(self) -> None:
        from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

        self.metric = LearnedPerceptualImagePatchSimilarity(net_type="alex", reduction="none")

    @torch.no_grad()
    def distance(self, first: Tensor, second: Tensor) -> Tensor:
        distances: Tensor = self.metric(first, second)
        return distances.flatten()


def _real() -> Features:
    from torchmetrics.image.fid import FrechetInceptionDistance

    FrechetInceptionDistance(2048)
    return Features(("clip", "lpips", "fid"), _Clip(), _Lpips(), 2048)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
