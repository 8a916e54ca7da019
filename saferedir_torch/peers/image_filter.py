"""A filter after the fact: every picture is drawn, and one in which the concept is found is replaced by a blank."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from saferedir_torch.peers.peer import Peer

#: Of a picture that is not handed out, in [-1, 1].
BLANK = 0.0


class ImageFilter(Peer):
    """Refuses what a classifier of pictures finds the concept in, as the checker of Stable Diffusion does."""

    name = "image filter"

    def __init__(self, pipeline: Any, found: Callable[[Tensor], Tensor], network: nn.Module, **drawing: Any) -> None:
        """`found` takes pictures [B, 3, H, W] in [-1, 1] and says [B] whether the concept is in them, by `network`."""
        super().__init__(pipeline, **drawing)
        self.found, self.network = found, network

    def finish(self, prompts: Sequence[str], pictures: Tensor) -> Tensor:
        found = self.found(pictures)[:, None, None, None]
        return torch.where(found, torch.full_like(pictures, BLANK), pictures)
