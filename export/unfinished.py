"""The folder that a bundle is made in: kept where making it is interrupted, and taken up by the next export of the same."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from saferedir.engines.errors import OutputError

END = ".unfinished"
#: What may end an export that is worth going on with; after any other error the same export would fail again.
INTERRUPTIONS = (KeyboardInterrupt, SystemExit, OSError, OutputError, MemoryError)


@contextmanager
def unfinished(out: Path, key: str) -> Iterator[Path]:
    """A hidden folder beside `out` for what `key` stands for, held by this process alone; its body moves it to `out`.

    It is removed after an error, and kept after an interruption where anything is in it. What exports of other things to
    `out` left behind is removed.

    Raises:
        OutputError: another process holds it.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = _place(out, key)
    folder.mkdir(exist_ok=True)
    held = _hold(folder)
    if held is None:
        raise OutputError(f"another process exports the same to {out}; wait for it, or name another folder")
    try:
        for other in out.parent.iterdir():
            same = other.name.startswith(f".{out.name}-") and other.name.endswith(END) and len(other.name) == len(folder.name)
            if same and other != folder:
                _remove(other)
        for path in folder.iterdir():
            if path.suffix != ".onnx":
                path.unlink()  # cut short, or made again in no time
        try:
            yield folder
        except INTERRUPTIONS:
            if not any(folder.glob("*.onnx")):
                shutil.rmtree(folder, ignore_errors=True)
            raise
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
    finally:
        os.close(held)


def _hold(folder: Path) -> int | None:
    """A descriptor of `folder` that holds its lock, or None where another process does."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


def _remove(folder: Path) -> None:
    """Remove what nobody works on."""
    held = _hold(folder)
    if held is not None:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(held)


def _place(out: Path, key: str) -> Path:
    return out.with_name(f".{out.name}-{key[:16]}{END}")
