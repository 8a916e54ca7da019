"""Aligns an unsafe prompt's tokens with its safe rewrite's, by a bijection of the T positions.

Cross-attention ignores the order of tokens, so a token may be matched with one at another position: equal token ids by
longest common subsequence first, all others (end of text and padding included) by least distance of their embeddings.
"""

from __future__ import annotations

from difflib import SequenceMatcher

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor


def align(unsafe_ids: Tensor, safe_ids: Tensor, unsafe: Tensor, safe: Tensor, end_id: int) -> Tensor:
    """For every position of the unsafe prompt, the position in the safe one that is its target.

    unsafe_ids, safe_ids [T] int; unsafe, safe [T, D] embeddings; `end_id` the end-of-text token, from which on
    positions are matched by distance alone -> permutation [T] int64.
    """
    tokens = len(unsafe_ids)
    matcher = SequenceMatcher(a=_words(unsafe_ids, end_id), b=_words(safe_ids, end_id), autojunk=False)
    partner = np.full(tokens, -1)
    for block in matcher.get_matching_blocks():
        partner[block.a : block.a + block.size] = np.arange(block.b, block.b + block.size)
    rest_unsafe = np.flatnonzero(partner < 0)
    rest_safe = np.setdiff1d(np.arange(tokens), partner[partner >= 0])
    if len(rest_unsafe):
        distance = torch.cdist(unsafe[rest_unsafe].float(), safe[rest_safe].float()).numpy()
        rows, columns = linear_sum_assignment(distance)
        partner[rest_unsafe[rows]] = rest_safe[columns]
    return torch.from_numpy(partner)


def _words(ids: Tensor, end_id: int) -> list[int]:
    listed: list[int] = ids.tolist()
    return listed[: listed.index(end_id)] if end_id in listed else listed


def aligned_targets(unsafe_ids: Tensor, safe_ids: Tensor, unsafe: Tensor, safe: Tensor, end_id: int) -> Tensor:
    """The safe embedding in the unsafe prompt's order: ids [B, T], embeddings [B, T, D] -> [B, T, D]."""
    rows = [safe[i][align(unsafe_ids[i], safe_ids[i], unsafe[i], safe[i], end_id)] for i in range(len(unsafe))]
    return torch.stack(rows)


def changed_tokens(unsafe: Tensor, target: Tensor, tau: float) -> Tensor:
    """1 where 1 - cos(unsafe_i, target_i) > tau: [B, T, D] twice -> [B, T] float."""
    cosine = torch.cosine_similarity(unsafe, target, dim=-1)
    return (1 - cosine > tau).float()


def exact_redirection(unsafe: Tensor, target: Tensor, tau: float, strength: float) -> Tensor:
    """What the redirection formula draws with perfect heads: mask by tau, step min(1, |target - p0| / (s |p0|)).

    [B, T, D] twice -> [B, T, D].
    """
    mask = changed_tokens(unsafe, target, tau).unsqueeze(-1)
    direction = target - unsafe
    length = direction.norm(dim=-1, keepdim=True).clamp(min=1e-6)
    reach = strength * unsafe.norm(dim=-1, keepdim=True)
    alpha = (length / reach).clamp(max=1)
    moved: Tensor = unsafe + mask * alpha * reach * direction / length
    return moved
