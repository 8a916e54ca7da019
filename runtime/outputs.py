"""Files that are whole or absent: written beside, then renamed."""

from __future__ import annotations

import io
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from PIL import Image

from saferedir.engines.errors import OutputError


@contextmanager
def output_folder(folder: Path) -> Iterator[Path]:
    """`folder`, made if need be before any work is done, and removed again if the work fails and left it empty.

    Raises:
        OutputError: it cannot be made or written.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OutputError(f"{folder} cannot be written to ({error.strerror}); choose another output folder") from error
    try:
        yield folder
    except BaseException:
        with suppress(OSError):  # not empty: something was finished and stays
            for path in made:
                path.rmdir()
        raise


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
