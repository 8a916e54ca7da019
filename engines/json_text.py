"""JSON that came from elsewhere: read by msgspec into a typed structure, or refused by the name of file and field."""

from __future__ import annotations

import json
from typing import Any, TypeVar

import msgspec

from saferedir.engines.errors import RequestError, SafeRedirError
from saferedir.engines.printable import printable

Read = TypeVar("Read")
#: Characters of a reason that are told.
LONGEST_REASON = 300


def read_json(data: bytes, kind: type[Read], source: str, error: type[SafeRedirError], *, largest: int) -> Read:
    """`data` as a `kind`; a field that is missing, unknown, there twice, or of another type or value is an `error`.

    Raises:
        error: names `source` and the field, and says what was expected.
    """
    if len(data) > largest:
        raise error(f"{source} has {len(data)} bytes; expected at most {largest}")
    try:
        read = msgspec.json.decode(data, type=kind)
        json.loads(data, object_pairs_hook=_without_twins)
    except UnicodeDecodeError as reason:
        raise error(f"{source} is not UTF-8 text at byte {reason.start}; restore it") from None
    except RecursionError:
        raise error(f"{source} is nested too deeply; restore it") from None
    except (msgspec.MsgspecError, ValueError) as reason:
        raise error(f"{source}: {_told(str(reason))}; restore it") from None
    return read


def check_stated(value: Any, kind: Any, what: str) -> None:
    """Raise `RequestError` where `value` is not what `read_json` would read as a `kind`, before it is written."""
    try:
        msgspec.convert(msgspec.to_builtins(value), kind)
    except msgspec.ValidationError as reason:
        raise RequestError(f"{what} is not what a bundle can state: {_told(str(reason))}") from None


def _told(reason: str) -> str:
    shown = printable(reason)
    return shown if len(shown) <= LONGEST_REASON else f"{shown[:LONGEST_REASON]}..."


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the field {next(name for name in names if names.count(name) > 1)!r} is there twice")
    return fields
