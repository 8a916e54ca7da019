"""Losses of the two networks; each is a mean over the batch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from saferedir_torch.redirector import REACH, Redirection, redirect

#: Weight of the aim of tokens that are to stay, against that of tokens that are to be moved: a fallback that keeps its subject
#: takes every token to where it is aimed.
STAYING = 0.3


def detection_loss(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Binary cross-entropy per concept: logits, labels and weights [B, N]; a weight of 0 leaves a case out."""
    losses = F.binary_cross_entropy_with_logits(logits, labels, reduction="none")
    return (losses * weights).sum() / weights.sum().clamp(min=1)


def redirection_loss(
    redirection: Redirection, original: Tensor, target: Tensor, mask: Tensor
) -> tuple[Tensor, dict[str, float]]:  # fmt: skip
    """How far the heads, and the embedding they make together, are from the aligned safe rewrite.

    original c0 and target [B, T, D], mask [B, T] 1 where the token is to be moved. Aim, direction, step length and mask have
    targets of their own; the last term is the distance of the redirected embedding, so that the heads make up for each other's
    errors.
    """
    norm = original.norm(dim=-1).clamp(min=1e-6)
    wanted, found = target - original, redirection.directions[0]
    masked = mask.sum().clamp(min=1)
    aim = ((found - wanted).norm(dim=-1) / norm).square()
    direction = 1 - F.cosine_similarity(found, wanted, dim=-1)
    step = (wanted.norm(dim=-1) / (REACH * norm)).clamp(max=1)
    step_error = (redirection.length - step).square()
    mask_error = F.binary_cross_entropy_with_logits(redirection.mask_logits, mask)
    (moved,) = redirect([original], redirection)
    wanted_embedding = torch.where(mask.bool().unsqueeze(-1), target, original)
    distance = ((moved - wanted_embedding).norm(dim=-1) / norm).square()
    parts = {
        "aim": (aim * mask).sum() / masked + STAYING * (aim * (1 - mask)).mean(),
        "direction": (direction * mask).sum() / masked,
        "length": (step_error * mask).sum() / masked,
        "mask": mask_error,
        "moved": distance.mean() + (distance * mask).sum() / masked,
    }
    loss = parts["aim"] + parts["direction"] + parts["length"] + parts["mask"] + 2 * parts["moved"]
    return loss, {key: float(value.detach()) for key, value in parts.items()}
