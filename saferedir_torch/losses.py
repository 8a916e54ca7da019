"""Losses of the two networks; each is a mean over the batch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from saferedir_torch.redirector import Redirection, redirect


def detection_loss(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Binary cross-entropy per concept: logits, labels and weights [B, N]; a weight of 0 leaves a case out."""
    losses = F.binary_cross_entropy_with_logits(logits, labels, reduction="none")
    return (losses * weights).sum() / weights.sum().clamp(min=1)


def redirection_loss(
    redirection: Redirection, original: Tensor, target: Tensor, mask: Tensor, *, strength: float
) -> tuple[Tensor, dict[str, float]]:
    """How far the heads, and the embedding they make together, are from the aligned safe rewrite.

    original p0 and target [B, T, D], mask [B, T] 1 where the token is to be moved; elsewhere only the mask is taught.
    Direction, step length and mask have targets of their own; the last term is the distance of the redirected
    embedding, so that the heads make up for each other's errors.
    """
    norm = original.norm(dim=-1).clamp(min=1e-6)
    wanted = target - original
    masked = mask.sum().clamp(min=1)
    aim = ((redirection.target - target).norm(dim=-1) / norm).square()
    direction = 1 - F.cosine_similarity(redirection.target - original, wanted, dim=-1)
    step = (wanted.norm(dim=-1) / (strength * norm)).clamp(max=1)
    step_error = (redirection.alpha - step).square()
    mask_error = F.binary_cross_entropy_with_logits(redirection.mask_logits, mask)
    scale = torch.full((len(original), 1), strength, device=original.device)
    moved = redirect(original, redirection, scale)
    wanted_embedding = torch.where(mask.bool().unsqueeze(-1), target, original)
    distance = ((moved - wanted_embedding).norm(dim=-1) / norm).square()
    parts = {
        "aim": (aim * mask).sum() / masked,
        "direction": (direction * mask).sum() / masked,
        "length": (step_error * mask).sum() / masked,
        "mask": mask_error,
        "moved": distance.mean() + (distance * mask).sum() / masked,
    }
    loss = parts["aim"] + parts["direction"] + parts["length"] + parts["mask"] + 2 * parts["moved"]
    return loss, {key: float(value.detach()) for key, value in parts.items()}
