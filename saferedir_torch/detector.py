"""The detector: latent, timestep and prompt embedding to a score per concept (arXiv 2601.08623, section on fusion)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saferedir_torch.config import SafetyConfig

#: What a word says before training: nothing, even when 77 of them are pooled.
QUIET = -8.0


class SqueezeExcitation(nn.Module):
    """Scales each channel by a gate computed from all channels' means (Hu et al. 2018)."""

    def __init__(self, channels: int, reduction: int = 8) -> None:
        super().__init__()
        self.squeeze = nn.Linear(channels, channels // reduction)
        self.excite = nn.Linear(channels // reduction, channels)

    def forward(self, features: Tensor) -> Tensor:
        """[B, C, h, w] -> the same shape."""
        gates = torch.sigmoid(self.excite(F.silu(self.squeeze(features.mean(dim=(2, 3))))))
        return features * gates[:, :, None, None]


class ResidualSE(nn.Module):
    """Two 3x3 convolutions, group-normalised, gated by squeeze-and-excitation, beside a 1x1 shortcut."""

    def __init__(self, before: int, after: int, *, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(before, after, 3, stride=stride, padding=1)
        self.first_norm = nn.GroupNorm(8, after)
        self.second = nn.Conv2d(after, after, 3, padding=1)
        self.second_norm = nn.GroupNorm(8, after)
        self.gate = SqueezeExcitation(after)
        self.shortcut = nn.Conv2d(before, after, 1, stride=stride)

    def forward(self, features: Tensor) -> Tensor:
        """[B, before, h, w] -> [B, after, h / stride, w / stride]."""
        hidden = F.silu(self.first_norm(self.first(features)))
        hidden = self.gate(self.second_norm(self.second(hidden)))
        return F.silu(hidden + self.shortcut(features))


class LatentEncoder(nn.Module):
    """Halves the latent first, then three residual blocks, global average pool, linear.

    0.38 GFLOP at 64x64 latents, against 9.4 of the published encoder, which works at full resolution.
    """

    def __init__(self, config: SafetyConfig) -> None:
        super().__init__()
        first, second, third = config.latent_widths
        self.stem = nn.Conv2d(config.latent_channels, first, 3, stride=2, padding=1)
        self.blocks = nn.Sequential(
            ResidualSE(first, first, stride=1),
            ResidualSE(first, second, stride=2),
            ResidualSE(second, third, stride=2),
        )
        self.project = nn.Linear(third, config.latent_features)

    def forward(self, latent: Tensor) -> Tensor:
        """[B, C, h, w] -> [B, latent_features]."""
        features = self.blocks(F.silu(self.stem(latent)))
        projected: Tensor = F.silu(self.project(features.mean(dim=(2, 3))))
        return projected


def sinusoid_frequencies(count: int) -> Tensor:
    """10000^(-i / count), [count].

    The exponential is taken in double and rounded: in single its last bit depends on the processor's vector unit, and with it
    the bytes of every graph that holds these.
    """
    exponents = torch.arange(count, dtype=torch.float32) / count
    return torch.exp((-math.log(10_000) * exponents).double()).float()


class TimestepEncoder(nn.Module):
    """Sinusoidal embedding of the timestep (0..999), linear, SiLU, LayerNorm."""

    frequencies: Tensor

    def __init__(self, config: SafetyConfig) -> None:
        super().__init__()
        self.register_buffer("frequencies", sinusoid_frequencies(config.timestep_frequencies // 2), persistent=False)
        self.project = nn.Linear(config.timestep_frequencies, config.timestep_features)
        self.norm = nn.LayerNorm(config.timestep_features)

    def forward(self, timestep: Tensor) -> Tensor:
        """[B] float -> [B, timestep_features]."""
        angles = timestep[:, None] * self.frequencies
        embedding = torch.cat([angles.sin(), angles.cos()], dim=1)
        normed: Tensor = self.norm(F.silu(self.project(embedding)))
        return normed


def mean_over_tokens(prompt: Tensor) -> Tensor:
    """[B, T, D] -> [B, 1, D].

    As a product: ONNX Runtime's CPU kernel adds up over a middle axis in another order where a request is alone in its batch.
    """
    tokens = prompt.shape[1]
    return prompt.new_full((1, 1, tokens), 1 / tokens) @ prompt


class PromptContext(nn.Module):
    """Cross-attention of the joint feature over the prompt tokens, one query a head, fused to one vector.

    With a single query a head no keys or values are needed per token: the key projection is applied to the query and
    the value projection to the attended mean, which is the same sum in another order.
    """

    def __init__(self, config: SafetyConfig) -> None:
        super().__init__()
        width, heads = config.prompt_width, config.context_heads
        self.heads = heads
        self.scale = 1 / math.sqrt(width)
        self.query = nn.Linear(config.joint_features, heads * width)
        self.key = nn.Parameter(torch.empty(heads, width, width))
        self.value = nn.Parameter(torch.empty(heads, width, width))
        self.value_bias = nn.Parameter(torch.zeros(heads, width))
        self.norm = nn.LayerNorm(width)
        self.fuse = nn.Linear(heads * width, width)
        self.fuse_norm = nn.LayerNorm(width)
        for weight in (self.key, self.value):
            nn.init.normal_(weight, std=1 / math.sqrt(width))

    def forward(self, joint: Tensor, prompt: Tensor) -> Tensor:
        """joint [B, J], prompt [B, T, D] -> context [B, D]."""
        batch = joint.shape[0]
        query = self.query(joint).reshape(batch, self.heads, 1, -1)  # [B, H, 1, D]
        folded = (query @ self.key).squeeze(2)  # [B, H, D] = W_k^T q
        weights = torch.softmax(folded @ prompt.transpose(1, 2) * self.scale, dim=-1)  # [B, H, T]
        attended = weights @ prompt + mean_over_tokens(prompt)  # [B, H, D]
        values = (attended.unsqueeze(2) @ self.value).squeeze(2) + self.value_bias  # [B, H, D]
        fused: Tensor = self.fuse_norm(self.fuse(self.norm(values).flatten(1)))
        return fused


class PictureEncoder(nn.Module):
    """Two residual blocks on the picture to be expected, the first at its own resolution and halving it; mean and maximum over
    places, linear.

    A thing that stands beside another is a few latents wide, and the maximum finds it wherever it is. 0.8 GFLOP at 64x64.
    """

    def __init__(self, config: SafetyConfig) -> None:
        super().__init__()
        first, second, third = config.picture_widths
        self.stem = nn.Conv2d(config.latent_channels, first, 3, padding=1)
        self.blocks = nn.Sequential(ResidualSE(first, second, stride=2), ResidualSE(second, third, stride=1))
        self.project = nn.Linear(2 * third, config.picture_features)

    def forward(self, picture: Tensor) -> Tensor:
        """[B, C, h, w] -> [B, picture_features]."""
        features = self.blocks(F.silu(self.stem(picture)))
        pooled = torch.cat([features.mean(dim=(2, 3)), features.amax(dim=(2, 3))], dim=1)
        projected: Tensor = F.silu(self.project(pooled))
        return projected


class AloneEvidence(nn.Module):
    """What a step shows, whatever the prompt: a logit per concept from the picture to be expected and j."""

    def __init__(self, config: SafetyConfig, concepts: int) -> None:
        super().__init__()
        self.picture = PictureEncoder(config)
        self.head = nn.Linear(config.picture_features + config.joint_features, concepts)

    def forward(self, joint: Tensor, expected: Tensor) -> Tensor:
        """j [B, J], picture to be expected [B, C, h, w] -> logits [B, concepts]."""
        logits: Tensor = self.head(torch.cat([self.picture(expected), joint], dim=1))
        return logits


class StepEncoder(nn.Module):
    """What a step looks like: latent and timestep in one joint feature j, shared by all concepts."""

    def __init__(self, config: SafetyConfig) -> None:
        super().__init__()
        self.latent = LatentEncoder(config)
        self.timestep = TimestepEncoder(config)

    def forward(self, latent: Tensor, timestep: Tensor) -> Tensor:
        """latent [B, C, h, w], timestep [B] -> j [B, J]."""
        return torch.cat([self.latent(latent), self.timestep(timestep)], dim=1)


class WordEvidence(nn.Module):
    """What single words say: a logit per token and concept, pooled by a smooth maximum, so that it does not matter what
    else a prompt asks for."""

    def __init__(self, config: SafetyConfig, concepts: int) -> None:
        super().__init__()
        self.first = nn.Linear(config.prompt_width, config.words_width)
        self.second = nn.Linear(config.words_width, concepts)
        nn.init.constant_(self.second.bias, QUIET)

    def forward(self, prompt: Tensor) -> Tensor:
        """prompt [B, T, D] -> logits [B, concepts]."""
        return torch.logsumexp(self.tokens(prompt), dim=1)

    def tokens(self, prompt: Tensor) -> Tensor:
        """prompt [B, T, D] -> logits of every token, [B, T, concepts]."""
        logits: Tensor = self.second(F.silu(self.first(prompt)))
        return logits


class Detector(nn.Module):
    """Logit per concept from j and the prompt in force: what latent, timestep and prompt say together, or else a word."""

    def __init__(self, config: SafetyConfig, concepts: int) -> None:
        super().__init__()
        self.context = PromptContext(config)
        self.trunk = nn.Linear(config.joint_features + 2 * config.prompt_width, config.classifier_width)
        self.heads = nn.Linear(config.classifier_width, concepts)
        self.words = WordEvidence(config, concepts)

    def forward(self, joint: Tensor, prompt: Tensor, words: Tensor | None = None) -> Tensor:
        """j [B, J], prompt in force [B, T, D] -> logits [B, concepts]. `words` [B, concepts] is what its single words say,
        computed here where it is not given."""
        words = self.words(prompt) if words is None else words
        features = torch.cat([joint, mean_over_tokens(prompt).squeeze(1), self.context(joint, prompt)], dim=1)
        logits: Tensor = self.heads(F.silu(self.trunk(features)))
        # An "or" of both. Not by softplus, whose last bit in ONNX Runtime depends on a request's place in its batch.
        return torch.logsumexp(torch.stack([logits, words]), dim=0)
