"""A tokenizer that several threads share.

A tokenizer of transformers is first told how to pad and where to cut, and then reads as it was told. Of two threads the one
could read as the other asked. So it is given a class of its own, made of the one it had, in which they take turns.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

#: Where versions of transformers tell it and read.
READING = ("__call__", "tokenize", "_encode_plus", "_batch_encode_plus")

_lock = threading.Lock()
#: Tokenizers in use -> the class they had, and how many need the other one.
_used: weakref.WeakKeyDictionary[Any, tuple[type, int]] = weakref.WeakKeyDictionary()


@contextmanager
def taking_turns(tokenizer: Any) -> Iterator[None]:
    """Let all who use `tokenizer` take turns while the context lasts; the last context gives it back its class."""
    with _lock:
        before, users = _used.get(tokenizer, (type(tokenizer), 0))
        if users == 0:
            tokenizer.__class__ = _turn_taking(before)
        _used[tokenizer] = (before, users + 1)
    try:
        yield
    finally:
        with _lock:
            before, users = _used.pop(tokenizer)
            if users == 1:
                tokenizer.__class__ = before
            else:
                _used[tokenizer] = (before, users - 1)


def _turn_taking(plain: Any) -> type:
    turn = threading.RLock()

    def in_turn(read: Any) -> Any:
        @functools.wraps(read)
        def reading(*args: Any, **kwargs: Any) -> Any:
            with turn:
                return read(*args, **kwargs)

        return reading

    namespace = {name: in_turn(getattr(plain, name)) for name in READING if hasattr(plain, name)}
    own = {"__module__": plain.__module__, "__qualname__": plain.__qualname__, "__doc__": plain.__doc__}
    return type(plain.__name__, (plain,), namespace | own)
