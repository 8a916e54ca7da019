"""Files that are whole or absent: written beside, then renamed."""

from __future__ import annotations

import os
from pathlib import Path

from saferedir.engines.errors import OutputError


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` to `path` as a whole.

    Raises:
        OutputError: it cannot be written; nothing is left behind.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(data)
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OutputError(f"{path} cannot be written ({error.strerror})") from error
