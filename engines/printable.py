"""Others' text, such as names in a bundle, as a terminal may be given it."""

from __future__ import annotations

import unicodedata


def printable(text: object, *, keep: str = "") -> str:
    """`text` with everything that a terminal would obey as an escape, such as \\x1b: control characters, line breaks, marks of
    direction, halves of surrogate pairs; what is in `keep` stays."""
    return "".join(letter if letter in keep or _is_seen(letter) else _escaped(letter) for letter in str(text))


def _is_seen(letter: str) -> bool:
    return letter == " " or unicodedata.category(letter)[0] not in "CZ"


def _escaped(letter: str) -> str:
    is_space = unicodedata.category(letter) == "Zs"
    return " " if is_space else letter.encode("unicode_escape").decode()
