"""Pictures beside and below each other in one PNG, for people to look at."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

#: Pixels between pictures.
GAP = 2


def save_rows(rows: Sequence[npt.NDArray[np.uint8]], path: Path) -> None:
    """A row of pictures for each of `rows`, [R, H, W, 3], all of one size."""
    height, width = rows[0].shape[1] + GAP, rows[0].shape[2] + GAP
    sheet = Image.new("RGB", (max(map(len, rows)) * width, len(rows) * height), "white")
    for top, row in enumerate(rows):
        for column, pixels in enumerate(row):
            sheet.paste(Image.fromarray(pixels), (column * width, top * height))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)
