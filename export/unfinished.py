"""The folder that a bundle is made in: kept where making it is interrupted, and taken up by the next export of the same."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from saferedir.engines.errors import OutputError

END = ".unfinished"
LOCK = ".lock"
#: What may end an export that is worth going on with; after any other error the same export would fail again.
INTERRUPTIONS = (KeyboardInterrupt, SystemExit, OSError, OutputError, MemoryError)
#: What is written while a bundle is made.
WRITTEN = (".onnx", ".safetensors", ".json", ".partial")


@contextmanager
def unfinished(out: Path, key: str) -> Iterator[Path]:
    """A hidden folder beside `out` for what `key` stands for, held by this process alone; its body moves it to `out`.

    It is removed after an error, and kept after an interruption where anything is in it. What exports of other things to
    `out` left behind is removed, unless there is in it what no export writes.

    Raises:
        OutputError: another process holds it, or it is not what an export left.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = _place(out, key)
    lock = _lock_of(folder)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise OutputError(f"another process exports the same to {out}; wait for it, or name another folder") from None
    try:
        folder.mkdir(exist_ok=True)
        if not _is_ours(folder):
            raise OutputError(f"{folder} holds what no export writes; move it away, or name another folder")
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
        _release(lock)


def _is_ours(folder: Path) -> bool:
    """Whether it is a folder of nothing but files that an export writes."""
    return (
        not folder.is_symlink()
        and folder.is_dir()
        and all(path.is_file() and not path.is_symlink() and path.suffix in WRITTEN for path in folder.iterdir())
    )


def _remove(folder: Path) -> None:
    """Remove what an export left and nobody works on."""
    if not _is_ours(folder):
        return
    lock = _lock_of(folder)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        return
    shutil.rmtree(folder, ignore_errors=True)
    _release(lock)


def _lock_of(folder: Path) -> FileLock:
    return FileLock(folder.with_name(f"{folder.name}{LOCK}"))


def _release(lock: FileLock) -> None:
    """Let go, and leave no file: it is removed while it is held, and who waits for it takes a new one."""
    Path(lock.lock_file).unlink(missing_ok=True)
    lock.release()


def _place(out: Path, key: str) -> Path:
    return out.with_name(f".{out.name}-{key[:16]}{END}")
