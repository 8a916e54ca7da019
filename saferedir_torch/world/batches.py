"""Pictures as tensors, and sheets of pictures for people to look at."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from saferedir_torch.world.scenes import Painter, Scene, draw


def picture_batch(scenes: Sequence[Scene], rng: np.random.Generator, paint: Painter = draw) -> Tensor:
    """Pictures of `scenes` as `paint` draws them, [B, 3, 64, 64] float32 in [-1, 1]."""
    pictures = np.stack([paint(scene, rng) for scene in scenes])
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous().float() / 127.5 - 1


def to_uint8(pictures: Tensor) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """[B, 3, H, W] in [-1, 1] -> [B, H, W, 3] uint8, rounded."""
    scaled = ((pictures.float().clamp(-1, 1) + 1) * 127.5).round()
    return scaled.to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def save_sheet(pictures: Tensor, path: Path, columns: int = 12) -> None:
    """A PNG grid of [B, 3, H, W] pictures."""
    tiles = to_uint8(pictures)
    rows = -(-len(tiles) // columns)
    height, width = tiles.shape[1:3]
    sheet = Image.new("RGB", (columns * (width + 2), rows * (height + 2)), "white")
    for index, tile in enumerate(tiles):
        sheet.paste(Image.fromarray(tile), (index % columns * (width + 2), index // columns * (height + 2)))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)
