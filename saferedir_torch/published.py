"""The network of the authors' released code, parameter for parameter (arXiv 2601.08623), for any prompt width.

It differs from the method here: one direction for all tokens, which is normalised after gate and mask were multiplied in,
so that both cancel out; no squeeze-and-excitation; attention scaled by sqrt(768) whatever the width.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

JOINT, TIME, LATENT = 576, 64, 512
ATTENTION_SCALE = math.sqrt(768)
#: Guards the division by a direction's length.
SMALLEST_NORM = 1e-12


class PublishedOutput(NamedTuple):
    """What the network says of a step."""

    #: Safe and unsafe, [B, 2].
    logits: Tensor
    #: Before it is normalised, [B, T, D].
    delta: Tensor
    #: [B, T].
    mask: Tensor
    #: [B, T, 1].
    alpha: Tensor


class _Block(nn.Module):
    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU(),
            nn.Conv2d(after, after, 3, padding=1), nn.BatchNorm2d(after),
        )  # fmt: skip
        self.downsample = nn.Conv2d(before, after, 1)

    def forward(self, features: Tensor) -> Tensor:
        return F.relu(self.conv(features) + self.downsample(features))


class _Head(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.query = nn.Linear(JOINT, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, joint: Tensor, prompt: Tensor) -> Tensor:
        value = self.value(prompt)
        scores = self.query(joint).unsqueeze(1) @ self.key(prompt).transpose(1, 2) / ATTENTION_SCALE
        attended = (torch.softmax(scores, dim=-1) @ value).squeeze(1)
        normed: Tensor = self.norm(attended + value.mean(dim=1))
        return normed


class _CrossAttention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = nn.ModuleList(_Head(width) for _ in range(4))
        self.fuse = nn.Sequential(nn.Linear(4 * width, width), nn.LayerNorm(width))

    def forward(self, joint: Tensor, prompt: Tensor) -> Tensor:
        fused: Tensor = self.fuse(torch.cat([head(joint, prompt) for head in self.heads], dim=1))
        return fused


class _LowRank(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.down = nn.Linear(width, 16, bias=False)
        self.up = nn.Linear(16, width, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        moved: Tensor = self.up(self.down(features)) * self.scale
        return moved


class _MaskPredictor(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(width, 4, batch_first=True)
        self.predictor = nn.Sequential(nn.Linear(width, 128), nn.ReLU(), nn.LayerNorm(128), nn.Linear(128, 1))

    def forward(self, prompt: Tensor) -> Tensor:
        attended, _ = self.attn(prompt, prompt, prompt, need_weights=False)
        return torch.sigmoid(self.predictor(attended).squeeze(-1))


class _AlphaPredictor(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(width, 256), nn.ReLU(), nn.Linear(256, 1))

    def forward(self, prompt: Tensor) -> Tensor:
        return torch.sigmoid(self.net(prompt))


class PublishedNetwork(nn.Module):
    """Named as the released checkpoints are, so that one loads by `load_state_dict`."""

    frequencies: Tensor

    def __init__(self, *, tokens: int = 77, width: int = 768, channels: int = 4) -> None:
        super().__init__()
        self.channels = channels
        self.pos_embed = nn.Parameter(torch.zeros(1, tokens, width))
        self.latent_encoder = nn.Sequential(
            _Block(channels, 64), _Block(64, 128), _Block(128, 256),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, LATENT), nn.ReLU(),
        )  # fmt: skip
        self.t_encoder = nn.Sequential(nn.Linear(320, TIME), nn.SiLU(), nn.LayerNorm(TIME))
        self.cross_attn = _CrossAttention(width)
        self.classifier = nn.Sequential(nn.Linear(JOINT + 2 * width, 256), nn.ReLU(), nn.Dropout(0.1), nn.Linear(256, 2))
        self.token_proj = nn.Sequential(nn.Linear(JOINT + width, 512), nn.ReLU(), nn.Linear(512, width))
        self.delta_head = _LowRank(width)
        self.gate_linear = nn.Linear(width, 1)
        self.mask_predictor = _MaskPredictor(width)
        self.alpha_predictor = _AlphaPredictor(width)
        exponents = torch.arange(160, dtype=torch.float32) / 160
        self.register_buffer("frequencies", torch.exp(-math.log(10_000) * exponents), persistent=False)

    def forward(self, latent: Tensor, prompt: Tensor, timestep: Tensor) -> PublishedOutput:
        """latent [B, C, h, w], conditional prompt embedding [B, T, D], timestep [B]."""
        angles = timestep[:, None] * self.frequencies
        time = self.t_encoder(torch.cat([angles.sin(), angles.cos()], dim=1))
        joint = torch.cat([self.latent_encoder(latent), time], dim=1)
        context = self.cross_attn(joint, prompt)
        logits = self.classifier(torch.cat([joint, prompt.mean(dim=1), context], dim=1))
        shared = self.delta_head(self.token_proj(torch.cat([joint, context], dim=1)))
        gate = torch.sigmoid(self.gate_linear(prompt + self.pos_embed))
        mask = self.mask_predictor(prompt)
        delta = shared.unsqueeze(1) * gate * mask.unsqueeze(-1)
        return PublishedOutput(logits, delta, mask, self.alpha_predictor(prompt))


def published_step(
    original: Tensor, output: PublishedOutput, alpha_scale: float | Tensor, *, mask_again: bool = False
) -> Tensor:
    """e0 + alpha_scale * alpha_i * u_i * |e0_i| with u_i the unit direction: original [B, T, D] -> [B, T, D].

    `alpha_scale` is a number or [B, 1, 1]; with `mask_again` the displacement is multiplied by m_i.
    """
    length = output.delta.norm(dim=-1, keepdim=True).clamp(min=SMALLEST_NORM)
    step = alpha_scale * output.alpha * output.delta / length * original.norm(dim=-1, keepdim=True)
    moved: Tensor = original + (step * output.mask.unsqueeze(-1) if mask_again else step)
    return moved
