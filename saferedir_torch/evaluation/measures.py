"""FSR, CSDR and their like, as the design has them; networks come in as arguments."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

#: The judge accuses at most this share of rewrites, which show nothing of the concept.
FALSE_ALARMS = 0.001
#: What the judge finds is at least as likely to be there as not.
FOUND = 0.5


def strict_threshold(rewrite_scores: npt.NDArray[np.floating[npt.NBitBase]]) -> float:
    """The 99.9th percentile of a judge's probabilities on validation rewrites [P]. Of a judge that is sure of nearly all of
    them it is next to nothing, and to be found there is to be thought absent."""
    return float(np.quantile(rewrite_scores, 1 - FALSE_ALARMS))


def found_threshold(rewrite_scores: npt.NDArray[np.floating[npt.NBitBase]]) -> float:
    """The judge's threshold for a concept: even odds, or more where that would accuse more than one rewrite in a thousand.

    Whether a judge still finds the concept there is said by its recall on unprotected pictures, which goes with it.
    """
    return max(FOUND, strict_threshold(rewrite_scores))


def score_difference_rates(reference: Tensor, image: Tensor) -> Tensor:
    """|s(ref) - s(img)| / s(ref) of each picture, whose mean is the CSDR (arXiv 2601.08623).

    reference, image [B]: image-text scores of both pictures against the prompt with the concept's words removed. NaN
    where the reference itself scores 0, so that nothing can be said.
    """
    return torch.where(reference > 0, (reference - image).abs() / reference, torch.nan)
