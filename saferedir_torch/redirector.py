"""The redirector: moves the offending tokens of the original prompt embedding to a safe meaning."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saferedir_torch.config import SafetyConfig

#: Guards the division by a direction's length; a direction this short is no direction.
SMALLEST_NORM = 1e-6


class Redirection(NamedTuple):
    """What the three heads say of every token."""

    #: q, the safe token that is aimed at, [B, T, D].
    target: Tensor
    #: a, step length in [0, 1], [B, T].
    alpha: Tensor
    #: m, soft mask in [0, 1], [B, T].
    mask: Tensor
    #: The mask before its sigmoid, for the loss, [B, T].
    mask_logits: Tensor


class TokenContext(nn.Module):
    """Self-attention over the prompt tokens: what every token knows of the others. Depends on the prompt alone."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.packed = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, prompt: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        batch, tokens, width = prompt.shape
        packed = self.packed(self.norm(prompt)).reshape(batch, tokens, 3, self.heads, width // self.heads)
        query, key, value = packed.permute(2, 0, 3, 1, 4).unbind(0)  # [B, H, T, D / H]
        weights = torch.softmax(query @ key.transpose(2, 3) * (width // self.heads) ** -0.5, dim=-1)
        attended = (weights @ value).transpose(1, 2).reshape(batch, tokens, width)
        mixed: Tensor = self.out(attended)
        return mixed


class Redirector(nn.Module):
    """Three heads over a trunk that joins the token, its context and, for all tokens alike, j, c and the active set."""

    def __init__(self, config: SafetyConfig, concepts: int) -> None:
        super().__init__()
        width, hidden = config.prompt_width, config.redirector_width
        self.token_context = TokenContext(width, config.redirector_heads)
        self.from_tokens = nn.Linear(2 * width, hidden)
        self.from_step = nn.Linear(config.joint_features + width, hidden)
        self.from_active = nn.Linear(concepts, hidden, bias=False)
        self.trunk = nn.Linear(hidden, hidden)
        self.project = nn.Linear(width, width)
        self.adapter_down = nn.Linear(hidden, config.adapter_rank)
        self.adapter_up = nn.Linear(config.adapter_rank, width)
        self.target_head = nn.Linear(hidden, width)
        self.alpha_head = nn.Linear(hidden, 1)
        self.mask_head = nn.Linear(hidden, 1)
        nn.init.eye_(self.project.weight)
        nn.init.zeros_(self.project.bias)
        nn.init.normal_(self.adapter_up.weight, std=1e-2)
        nn.init.zeros_(self.adapter_up.bias)

    def prompt_features(self, prompt: Tensor) -> Tensor:
        """What depends on the prompt alone, computed once per prompt: p0 [B, T, D] -> [B, T, hidden]."""
        features: Tensor = self.from_tokens(torch.cat([prompt, self.token_context(prompt)], dim=-1))
        return features

    def heads(self, prompt: Tensor, prompt_features: Tensor, joint: Tensor, context: Tensor, active: Tensor) -> Redirection:
        """p0 [B, T, D], its features, j [B, J], c of p0 [B, D], active [B, concepts] in {0, 1} -> the three heads."""
        step = self.from_step(torch.cat([joint, context], dim=-1)) + self.from_active(active)
        hidden = F.silu(self.trunk(F.silu(prompt_features + step.unsqueeze(1))))
        target = self.project(prompt) + self.target_head(hidden) + self.adapter_up(self.adapter_down(hidden))
        mask_logits = self.mask_head(hidden).squeeze(-1)
        alpha = torch.sigmoid(self.alpha_head(hidden).squeeze(-1))
        return Redirection(target, alpha, torch.sigmoid(mask_logits), mask_logits)


def redirect(prompt: Tensor, redirection: Redirection, strength: Tensor) -> Tensor:
    """p_i = p0_i + s m_i a_i |p0_i| d_i / |d_i| with d_i = q_i - p0_i (design of the method, section 2).

    prompt p0 [B, T, D], strength s [B, 1] -> [B, T, D].
    """
    direction = redirection.target - prompt
    length = direction.norm(dim=-1, keepdim=True).clamp(min=SMALLEST_NORM)
    step = (strength * redirection.mask * redirection.alpha).unsqueeze(-1) * prompt.norm(dim=-1, keepdim=True)
    moved: Tensor = prompt + step * direction / length
    return moved
