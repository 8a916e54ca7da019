"""Where pictures go: folders that are made before any work is done, and numbers that are free."""

from __future__ import annotations

import io
import os
import re
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from PIL import Image

from saferedir.engines.errors import OutputError

#: Bytes of a page in which it says what made it.
LONGEST_HEAD = 1_000
_NUMBERED = re.compile(r"(\d{4,18})-seed")


@contextmanager
def output_folder(folder: Path) -> Iterator[Path]:
    """`folder`, made if need be before any work is done, and removed again if the work fails and left it empty.

    Raises:
        OutputError: it cannot be made or written.
    """
    try:
        place = folder.resolve()  # a link stays one, and what it means is made
        made = [path for path in (place, *place.parents) if not path.exists()]
        place.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (OSError, RuntimeError) as error:  # a loop of links is one or the other
        reason = error.strerror if isinstance(error, OSError) else error
        raise OutputError(f"{folder} cannot be written to ({reason}); choose another output folder") from error
    try:
        yield folder
    except BaseException:
        with suppress(OSError):  # not empty: something was finished and stays
            for path in made:
                path.rmdir()
        raise


def refuse_strange(folder: Path, names: Sequence[str], page: str, mark: str) -> None:
    """Raise `OutputError` where one of `names` is in `folder`, and its `page` does not say by `mark` that all are ours."""
    own = folder / page
    ours = own.is_file() and mark.encode() in own.read_bytes()[:LONGEST_HEAD]
    there = [name for name in names if (folder / name).exists() or (folder / name).is_symlink()]
    if there and not ours:
        raise OutputError(f"{folder} holds {' and '.join(there)} of something else; choose another output folder")


def write_picture(folder: Path, seed: int, image: Image.Image) -> Path:
    """Write a picture under the folder's next free number, `0000-seed7.png`, and return where; nothing is ever overwritten.

    Raises:
        OutputError: it cannot be written; nothing is left behind.
    """
    data = png_bytes(image)
    taken = (_NUMBERED.match(path.name) for path in folder.iterdir())
    number = max((int(found[1]) for found in taken if found), default=-1) + 1
    while True:
        path = folder / f"{number:04d}-seed{seed}.png"
        try:
            _write_new(path, data)
        except FileExistsError:  # another process was faster
            number += 1
        except OSError as error:
            raise OutputError(f"{path} cannot be written ({error.strerror})") from error
        else:
            return path


def _write_new(path: Path, data: bytes) -> None:
    """Write a file that is whole when it is first seen under its name, and raise `FileExistsError` where it is there."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.partial")
    try:
        partial.write_bytes(data)
        try:
            os.link(partial, path)
        except FileExistsError:
            raise
        except OSError:  # a file system without links
            with path.open("xb") as file:
                file.write(data)
    finally:
        partial.unlink(missing_ok=True)


def png_bytes(image: Image.Image) -> bytes:
    """The picture as a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()
