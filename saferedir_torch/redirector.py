"""The redirector: moves the offending tokens of the original conditioning to a safe meaning."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from saferedir_torch.config import SafetyConfig

#: Guards the division by a direction's length; a direction this short is no direction.
SMALLEST_NORM = 1e-6
#: r of the formula: how far a token can be moved at most, in its own lengths.
REACH = 1.5


class Redirection(NamedTuple):
    """What the heads say of every token."""

    #: d_i of each stream, from the token to the safe one that is aimed at, [B, T_k, D_k].
    directions: list[Tensor]
    #: a, step length in [0, 1], [B, T].
    length: Tensor
    #: m, soft mask in [0, 1], [B, T].
    mask: Tensor
    #: The mask before its sigmoid, for the loss, [B, T].
    mask_logits: Tensor


class Redirector(nn.Module):
    """Heads over a trunk that joins the token and, for all tokens alike, j, the context and the active concepts.

    The network's own width is all that a direction can span (a low-rank way back to the streams' widths), so that it does not
    grow with the square of the conditioning's width.
    """

    def __init__(self, config: SafetyConfig, concepts: int) -> None:
        super().__init__()
        width = config.features
        self.sizes = [stream.tokens for stream in config.streams]
        self.from_token = nn.Linear(width, width)
        self.from_step = nn.Linear(2 * width + concepts, width)
        self.trunk = nn.Linear(width, width)
        self.length_and_mask = nn.Linear(width, 2)
        self.back = nn.ModuleList(nn.Linear(width, stream.width) for stream in config.streams)

    def forward(self, joint: Tensor, context: Tensor, active: Tensor, tokens: Tensor) -> Redirection:
        """j and context [B, features], active [B, concepts] in {0, 1}, tokens [B, T, features]."""
        return self.of_tokens(self.of_step(joint, context, active), tokens)

    def of_step(self, joint: Tensor, context: Tensor, active: Tensor) -> Tensor:
        """What is the same for all tokens, [B, features]."""
        step: Tensor = self.from_step(torch.cat([joint, context, active], dim=1))
        return step

    def of_tokens(self, step: Tensor, tokens: Tensor) -> Redirection:
        """What becomes of tokens [B, T, features], by what is the same for all, [B, features]."""
        joined = torch.relu(self.from_token(tokens) + step[:, None])
        parts = torch.split(joined, self.sizes, dim=1) if len(self.sizes) > 1 else [joined]
        heads = [self._heads(back, part) for back, part in zip(self.back, parts, strict=True)]
        logits = torch.cat([own for own, _ in heads], dim=1) if len(heads) > 1 else heads[0][0]
        shares = torch.sigmoid(logits)
        return Redirection([direction for _, direction in heads], shares[..., 0], shares[..., 1], logits[..., 1])

    def _heads(self, back: nn.Module, joined: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens of a stream [B, T_k, features] -> logits of length and mask [B, T_k, 2], and directions [B, T_k, D_k]."""
        hidden = torch.relu(self.trunk(joined.flatten(0, 1)))  # as rows: a graph then adds biases within the products
        logits, directions = self.length_and_mask(hidden), back(hidden)
        return tuple(rows.reshape(-1, joined.shape[1], rows.shape[1]) for rows in (logits, directions))


def redirect(original: Sequence[Tensor], redirection: Redirection, entirely: Tensor | None = None) -> list[Tensor]:
    """c_i = c0_i + s_i d_i of every stream [B, T_k, D_k], by s_i = r m_i a_i |c0_i| / |d_i|; where `entirely` [B, 1] bool, s_i
    is 1: a token becomes the one it is aimed at. A token of no length is padding, and stays so.
    """
    moved, start = [], 0
    step = REACH * redirection.mask * redirection.length
    for stream, direction in zip(original, redirection.directions, strict=True):
        own = step[:, start : start + stream.shape[1]] if len(original) > 1 else step
        length = stream.norm(dim=-1)
        share = own * length / direction.norm(dim=-1).clamp(min=SMALLEST_NORM)
        if entirely is not None:
            share = torch.where(entirely, (length > 0).to(share.dtype), share)
        moved.append(stream + share[..., None] * direction)
        start += stream.shape[1]
    return moved
