"""Text files of users: prompts and pairs as editors save them, read within bounds."""

from __future__ import annotations

import codecs
import re
from pathlib import Path

from saferedir.engines.errors import RequestError

#: Bytes that a file of prompts may have.
LARGEST = 16_000_000
_LINE_END = re.compile("\r\n|\n")


def read_text(path: Path) -> str:
    """What a file in UTF-8 says, or in UTF-16 that begins with its byte-order mark; the mark itself is left out.

    Raises:
        RequestError: it cannot be read, is larger than 16 MB, in another encoding, or holds a NUL.
    """
    try:
        with path.open("rb") as file:
            data = file.read(LARGEST + 1)
    except OSError as error:
        raise RequestError(f"{path} cannot be read ({error.strerror})") from error
    if len(data) > LARGEST:
        raise RequestError(f"{path} is larger than {LARGEST // 1_000_000} MB; expected a text file of at most that")
    marked = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = data.decode("utf-16" if marked else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise RequestError(f"{path} is no text in {error.encoding} (byte {error.start}); save it in UTF-8") from error
    if (place := text.find("\0")) >= 0:
        raise RequestError(f"{path} holds a NUL in line {text.count(chr(10), 0, place) + 1}; save it as text in UTF-8")
    return text


def read_prompts(path: Path) -> list[str]:
    """The lines of a file that hold a prompt, without spaces around them. A line ends at a line feed alone, with or without a
    carriage return before it; what else Unicode breaks lines at may stand in a prompt.

    Raises:
        RequestError: it cannot be read, as `read_text` says, or holds none.
    """
    prompts = [line.strip(" \t") for line in _LINE_END.split(read_text(path)) if line.strip()]
    if not prompts:
        raise RequestError(f"{path} holds no prompt; expected one a line")
    return prompts
