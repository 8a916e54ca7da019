"""Two results of one engine against each other, by polygraphy's comparators."""

from __future__ import annotations

import importlib.util
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
    #: `worst` is at most `allowed`, and both are finite in the same places.
    passed: bool
    allowed: float


def compare(found: Mapping[str, Any], expected: Mapping[str, Any], allowed: float) -> dict[str, Difference]:
    """Output -> how far `found` lies from `expected`, which have the same names and shapes.

    `allowed` is relative to an output's largest magnitude where that exceeds 1.
    """
    rows = {}
    with G_LOGGER.verbosity(G_LOGGER.CRITICAL):
        for name, reference in expected.items():
            pair = [IterationResult({name: _as_floats(array)}) for array in (found[name], reference)]
            scaled = allowed * max(1.0, float(np.abs(np.nan_to_num(_as_floats(reference))).max(initial=0.0)))
            simple = SimpleCompareFunc(check_error_stat="max", atol=scaled, rtol=0)(*pair)[name]
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
                scaled,
            )
    return rows


def worst_picture(found: Any, expected: Any) -> tuple[float, float | None]:
    """PSNR in dB and SSIM of the picture that is furthest off; pictures [R, H, W, 3] uint8.

    PSNR is infinite where all are equal, SSIM None where torchmetrics is not installed.
    """
    squares = ((found.astype(np.float64) - expected) ** 2).mean(axis=(1, 2, 3))
    worst = float(squares.max())
    psnr = float("inf") if worst == 0 else float(10 * np.log10(255**2 / worst))
    if any(importlib.util.find_spec(package) is None for package in ("torch", "torchmetrics")):
        return psnr, None
    import torch
    from torchmetrics.functional.image import structural_similarity_index_measure

    first, second = (torch.from_numpy(array).permute(0, 3, 1, 2).float() for array in (found, expected))
    each = structural_similarity_index_measure(first, second, data_range=255.0, reduction="none")
    return psnr, float(torch.as_tensor(each).min())


def _as_floats(array: Any) -> Any:
    return array if array.dtype.kind == "f" else array.astype(np.float64)


def _where(found: Any, expected: Any) -> str:
    error = np.abs(found.astype(np.float64) - expected.astype(np.float64))
    index = np.unravel_index(int(np.nan_to_num(error, nan=np.inf).argmax()), error.shape)
    return "[" + ", ".join(str(int(i)) for i in index) + "]"
