"""The networks that compare pictures: what a measure asks of them, and the real ones (CLIP, Inception, AlexNet)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, Protocol

import torch
from torch import Tensor, nn

from saferedir.engines.errors import RequestError

CLIP: Final = "openai/clip-vit-base-patch16"


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


def real_features() -> Features:
    """The networks that published figures are measured with.

    Raises:
        RequestError: their weights cannot be had here.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance

    try:
        FrechetInceptionDistance(2048)
        return Features(("clip", "lpips", "fid"), _Clip(), _Lpips(), 2048)
    except (ImportError, OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise RequestError(
            f"the weights of {CLIP}, Inception and AlexNet cannot be had here ({reason}); put them where transformers and "
            "torchvision look, or choose `world`"
        ) from error
