"""Two results of one engine against each other, by polygraphy's comparators."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from polygraphy.comparator import CosineSimilarityCompareFunc, IterationResult, SimpleCompareFunc
from polygraphy.logger import G_LOGGER


class Difference(NamedTuple):
    """How far an output lies from another; true and false count as 1 and 0."""

    worst: float
    mean: float
    worst_relative: float
    mean_relative: float
    #: Of both, flattened; 1 where both are zero throughout.
    cosine: float
    #: Index of the worst element.
    where: str
    #: `worst` is at most what is allowed, and both are finite in the same places.
    passed: bool


def compare(found: Mapping[str, Any], expected: Mapping[str, Any], allowed: float) -> dict[str, Difference]:
    """Output -> how far `found` lies from `expected`, which have the same names and shapes."""
    rows = {}
    with G_LOGGER.verbosity(G_LOGGER.CRITICAL):
        for name, reference in expected.items():
            pair = [IterationResult({name: _as_floats(array)}) for array in (found[name], reference)]
            simple = SimpleCompareFunc(check_error_stat="max", atol=allowed, rtol=0)(*pair)[name]
            cosine = CosineSimilarityCompareFunc()(*pair)[name].cosine_similarity
            zero = not np.any(found[name]) and not np.any(reference)
            rows[name] = Difference(
                simple.max_absdiff,
                simple.mean_absdiff,
                simple.max_reldiff,
                simple.mean_reldiff,
                1.0 if zero else float(cosine),
                _where(found[name], reference),
                bool(simple) and np.isfinite(simple.max_absdiff),
            )
    return rows


def _as_floats(array: Any) -> Any:
    return array if array.dtype.kind == "f" else array.astype(np.float64)


def _where(found: Any, expected: Any) -> str:
    error = np.abs(found.astype(np.float64) - expected.astype(np.float64))
    index = np.unravel_index(int(np.nan_to_num(error, nan=np.inf).argmax()), error.shape)
    return "[" + ", ".join(str(int(i)) for i in index) + "]"
