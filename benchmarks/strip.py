"""The pictures at the top of the README: above as the model draws them, below under safety."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.contact_sheet import save_rows
from benchmarks.drawing import plain_of
from saferedir.runtime import Pipeline

PATH = Path(__file__).parents[1] / "docs" / "strip.png"
#: Prompts and seeds.
SHOWN = {
    "a church next to a cat": 7,
    "a chapel beside a tree on green": 3,
    "a dog in ink style": 5,
    "a rocket in ink style": 2,
    "a sword next to a rabbit": 4,
    "a bow and arrow on blue": 9,
    "a balloon as a sticker": 1,
}
#: Times the embedded model's size, without smoothing.
ENLARGED = 2


def main() -> None:
    protected = Pipeline.from_bundle()
    rows = []
    for pipeline in (plain_of(protected), protected):
        drawn = pipeline(list(SHOWN), seed=list(SHOWN.values())).images
        size = ENLARGED * drawn[0].width, ENLARGED * drawn[0].height
        rows.append(np.stack([np.asarray(image.resize(size, Image.Resampling.NEAREST)) for image in drawn]))
    save_rows(rows, PATH)
    print(PATH)


if __name__ == "__main__":
    main()
