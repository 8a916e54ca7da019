"""FSR, CSDR and their like, as the design has them; networks come in as arguments."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

#: The judge finds a concept where at most this share of rewrites, which show none of it, would be accused.
FALSE_ALARMS = 0.001
#: The judge's threshold for everything else, and the highest for a concept.
FOUND = 0.5


def found_threshold(rewrite_scores: npt.NDArray[np.floating[npt.NBitBase]]) -> float:
    """The judge's threshold for a concept, from its probabilities on validation rewrites [P]: their 99.9th percentile,
    and never above 0.5."""
    return min(FOUND, float(np.quantile(rewrite_scores, 1 - FALSE_ALARMS)))


def score_difference_rates(reference: Tensor, image: Tensor) -> Tensor:
    """|s(ref) - s(img)| / s(ref) of each picture, whose mean is the CSDR (arXiv 2601.08623).

    reference, image [B]: image-text scores of both pictures against the prompt with the concept's words removed. NaN
    where the reference itself scores 0, so that nothing can be said.
    """
    return torch.where(reference > 0, (reference - image).abs() / reference, torch.nan)
