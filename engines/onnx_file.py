"""Which files an ONNX graph reads, found in its bytes without the package `onnx`.

ONNX is protocol buffers (onnx/onnx.proto); a tensor names a file of weights in its `external_data`. ONNX Runtime resolves such
names by itself: of a graph that comes as bytes, in the working directory.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

from saferedir.engines.errors import BundleAlteredError

#: Message -> field that leads to other messages -> which ones.
_PARTS = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {13: "entry"},
}
#: Where weights may lie outside: among the initializers of the graph itself.
_INITIALIZER = ("graph", "tensor", "entry")
_DEEPEST = 64


def check_external_data(model: bytes, allowed: Collection[str], source: str) -> None:
    """Raise `BundleAlteredError` where the graph reads another file than those `allowed`, or is cut short."""
    try:
        for path, entry in _entries(memoryview(model), "model", ()):
            named = {number: bytes(value) for number, value in _fields(entry)}
            if named.get(1) != b"location":
                continue
            location = named.get(2, b"").decode("utf-8", "backslashreplace")
            if path != _INITIALIZER or location not in allowed:
                raise BundleAlteredError(f"{source} reads {location!r}, which the manifest does not list for it")
    except (IndexError, ValueError) as error:
        raise BundleAlteredError(f"{source} is no ONNX graph ({error}); export the bundle again") from None


def _entries(message: memoryview, kind: str, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], memoryview]]:
    """Every `external_data` entry of a message of that kind, and the messages that it lies in."""
    if len(path) > _DEEPEST:
        raise ValueError("it is nested too deeply")
    parts = _PARTS[kind]
    for number, value in _fields(message):
        part = parts.get(number)
        if part == "entry":
            yield (*path, part), value
        elif part is not None:
            yield from _entries(value, part, (*path, part))


def _fields(message: memoryview) -> Iterator[tuple[int, memoryview]]:
    """The fields of a message that hold bytes, with their numbers; numbers are passed over."""
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        number, wire = tag >> 3, tag & 7
        if wire == 0:
            _, at = _varint(message, at)
        elif wire == 1:
            at += 8
        elif wire == 5:
            at += 4
        elif wire == 2:
            length, at = _varint(message, at)
            if at + length > len(message):
                raise ValueError("it is cut short")
            yield number, message[at : at + length]
            at += length
        else:
            raise ValueError(f"it has a field of type {wire}")
    if at > len(message):
        raise ValueError("it is cut short")


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    """A number of seven bits a byte, and where it ends."""
    value = shift = 0
    while shift < 70:
        byte = message[at]
        value |= (byte & 0x7F) << shift
        at += 1
        if byte < 0x80:
            return value, at
        shift += 7
    raise ValueError("it has a number of more than 64 bits")
