"""Keys of tenants: hashed at rest, compared in constant time, each with a rate of its own."""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from saferedir.engines.errors import RequestError
from saferedir.engines.whole_file import write_bytes

#: What a key begins with, so that people and scanners know one.
MARK = "srk_"
BYTES = 32


class KeyInfo(Struct, frozen=True, forbid_unknown_fields=True):
    """One key, as the file has it."""

    tenant: Annotated[str, Meta(min_length=1, max_length=200)]
    #: SHA-256 of the key. Keys hold 256 random bits, so that no slow hash is needed.
    sha256: Annotated[str, Meta(pattern=r"\A[0-9a-f]{64}\Z")]
    #: Pictures a minute; any number where it is left out.
    pictures_per_minute: Annotated[float, Meta(gt=0)] | None = None


def make_key(tenant: str, pictures_per_minute: float | None = None) -> tuple[str, KeyInfo]:
    """A new key, which is told once, and what the file has of it."""
    key = MARK + secrets.token_urlsafe(BYTES)
    return key, KeyInfo(tenant, _hash(key), pictures_per_minute)


def add_key(path: Path, tenant: str, pictures_per_minute: float | None = None) -> str:
    """Make a key, add it to the file of keys, whole or not at all, and return it.

    Raises:
        RequestError: the file is no file of keys, or a value is out of range.
    """
    known = _read(path) if path.exists() else ()
    key, info = make_key(tenant, pictures_per_minute)
    data = msgspec.json.format(msgspec.json.encode((*known, info)))
    try:
        msgspec.json.decode(data, type=tuple[KeyInfo, ...])
    except msgspec.ValidationError as error:
        raise RequestError(f"no key was made: {error}") from error
    write_bytes(path, data)
    return key


@dataclass
class _Bucket:
    """Pictures that may be drawn at once, refilled over a minute."""

    level: float
    at: float


class Keys:
    """Who may draw, and how much."""

    def __init__(self, path: Path | None) -> None:
        """
        Raises:
            RequestError: the file cannot be read as keys.
        """
        self.required = path is not None
        self._known = _read(path) if path is not None else ()
        self._buckets: dict[str, _Bucket] = {}

    def find(self, key: str) -> KeyInfo | None:
        """The key, if it is known. All are compared, so that time tells nothing."""
        own, found = _hash(key), None
        for info in self._known:
            if hmac.compare_digest(info.sha256, own):
                found = info
        return found

    def wait(self, info: KeyInfo, pictures: int) -> float:
        """Take `pictures` from what the key may draw: 0, or in how many seconds there will be enough."""
        if info.pictures_per_minute is None:
            return 0.0
        now, most, rate = time.monotonic(), max(1.0, info.pictures_per_minute), info.pictures_per_minute / 60
        bucket = self._buckets.setdefault(info.sha256, _Bucket(most, now))
        bucket.level, bucket.at = min(most, bucket.level + rate * (now - bucket.at)), now
        if pictures > bucket.level and bucket.level < most:
            return (min(pictures, most) - bucket.level) / rate
        bucket.level -= pictures
        return 0.0

    def give_back(self, info: KeyInfo, pictures: int) -> None:
        """What was taken, and is not drawn."""
        if (bucket := self._buckets.get(info.sha256)) is not None:
            bucket.level += pictures


def _hash(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def _read(path: Path) -> tuple[KeyInfo, ...]:
    try:
        return msgspec.json.decode(path.read_bytes(), type=tuple[KeyInfo, ...])
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror}") from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RequestError(f"{path} is no file of keys: {error}") from error
