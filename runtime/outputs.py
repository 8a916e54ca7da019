"""Files that are whole or absent: written beside, then renamed."""

from __future__ import annotations

import io
import os
import tempfile
from pathlib import Path

from PIL import Image

from saferedir.engines.errors import OutputError


def make_folder(folder: Path) -> Path:
    """`folder`, made if need be, after a trial that it can be written to.

    Raises:
        OutputError: it cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        raise OutputError(f"{folder} cannot be written to ({error.strerror}); choose another output folder") from error


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


def png_bytes(image: Image.Image) -> bytes:
    """The picture as a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()
