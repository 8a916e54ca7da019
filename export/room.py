"""Is there room? Asked before long work begins, so that it does not fail at its end."""

from __future__ import annotations

import shutil
from pathlib import Path

from saferedir.engines.errors import OutputError

MEMINFO = Path("/proc/meminfo")


def check_disk(folder: Path, needed: int, what: str) -> None:
    """Raise `OutputError` where `folder`, which need not be there yet, has less than `needed` bytes free for `what`."""
    place = next(path for path in (folder, *folder.resolve().parents) if path.exists())
    if (free := shutil.disk_usage(place).free) < needed:
        raise OutputError(f"{what} needs up to {needed / 1e6:.0f} MB in {folder}, {free / 1e6:.0f} MB are free")


def check_memory(needed: int, what: str) -> None:
    """Raise `OutputError` where the system says that it has less than `needed` bytes of memory to give."""
    available = available_memory()
    if available is not None and available < needed:
        raise OutputError(
            f"{what} needs about {needed / 1e9:.1f} GB of memory, {available / 1e9:.1f} GB are available; close other programs"
        )


def available_memory() -> int | None:
    """Bytes that can be had without swapping, or None where the system does not say."""
    try:
        lines = MEMINFO.read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError, IndexError):
        return None
