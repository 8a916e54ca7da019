"""What a policy may hold, of whichever program: concepts that are known, and numbers in their range."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from numbers import Integral, Real

import numpy as np

from saferedir.engines.errors import RequestError

#: Of the engines' numbers.
LARGEST = float(np.finfo(np.float32).max)
#: Steps of rest after firing, at most.
LONGEST_COOLDOWN = 1000


def check_enabled(enabled: object, known: Sequence[str]) -> None:
    """Raise `RequestError` unless `enabled` is None, or a collection of concepts that are `known`."""
    if enabled is None:
        return
    if isinstance(enabled, str) or not isinstance(enabled, Sequence | Set):
        raise RequestError(f"enabled is {enabled!r}; expected a tuple of concepts, such as ({known[0]!r},)")
    _check_names(enabled, known)


def check_numbers(name: str, numbers: object, known: Sequence[str]) -> None:
    """Raise `RequestError` unless `numbers` maps concepts that are `known` to finite numbers; `name` is the field's."""
    if not isinstance(numbers, Mapping):
        raise RequestError(f"{name} is {numbers!r}; expected a mapping of concepts to numbers, such as {{{known[0]!r}: 0.5}}")
    _check_names(numbers, known)
    for concept, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, Real) or not _is_finite(value):
            raise RequestError(f"{name} of {concept!r} is {value!r}; expected a finite number")


def check_ranges(thresholds: Mapping[str, float], alpha_scales: Mapping[str, float]) -> None:
    """Raise `RequestError` where a threshold is above 1, or a strength not above 0, as fp32 has them."""
    for concept, value in thresholds.items():
        if not np.float32(value) <= 1:
            raise RequestError(f"threshold of {concept!r} is {value}; expected a finite value of at most 1")
    for concept, value in alpha_scales.items():
        if not np.float32(value) > 0:
            raise RequestError(f"alpha_scale of {concept!r} is {value}; expected a finite value above 0")


def check_cooldown(cooldown: object) -> None:
    """Raise `RequestError` unless `cooldown` is a number of steps, or None."""
    whole = isinstance(cooldown, Integral) and not isinstance(cooldown, bool)
    if cooldown is not None and not (whole and 0 <= cooldown <= LONGEST_COOLDOWN):  # type: ignore[operator]
        raise RequestError(f"cooldown is {cooldown!r}; expected a whole number of 0 to {LONGEST_COOLDOWN} steps")


def _is_finite(value: Real) -> bool:
    """Whether it is a number of the engines'."""
    try:
        return abs(float(value)) <= LARGEST
    except OverflowError:
        return False


def _check_names(asked: Iterable[object], known: Sequence[str]) -> None:
    if unknown := [name for name in asked if not isinstance(name, str) or name not in known]:
        raise RequestError(f"unknown concept {', '.join(map(repr, unknown))}; expected some of {', '.join(known)}")
