"""The folder that a training is kept in: its own, or one in which nothing has a name that a training writes."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from saferedir.engines.errors import OutputError
from saferedir.engines.output_place import refuse_overlap

#: Marks a folder as a training's own, which the same command goes on in.
MARK = ".saferedir-training"
NAMES = ("safety", "loss.png")
ENDINGS = (".ckpt", ".csv", ".safetensors", ".partial")


def training_place(out: Path, read: Iterable[Path | None]) -> Path:
    """`out`, made and marked where it may be trained in. The folders `read` are none of those that are written.

    Raises:
        OutputError: it is or lies in what is read, holds files of something else, or cannot be written.
    """
    try:
        place = out.resolve()
        for given in read:
            if given is not None and given.exists():
                refuse_overlap(out / "safety", place / "safety", given, "--out")
        if place.is_dir() and not (place / MARK).exists():
            taken = sorted(path.name for path in place.iterdir() if path.name in NAMES or path.suffix in ENDINGS)
            if taken:
                raise OutputError(f"--out {out} holds {', '.join(taken[:3])} of something else; name a new folder")
        place.mkdir(parents=True, exist_ok=True)
        (place / MARK).touch()
    except (OSError, RuntimeError) as error:  # a loop of links is one or the other
        raise OutputError(f"--out {out} cannot be written: {error}") from error
    return out
