"""The detector: latent, carried estimate, noise level and conditioning to a log-odds per concept (arXiv 2601.08623).

It is trained with the conditioning left out in a share of the cases, as classifier-free guidance is (Ho and Salimans 2022). So
one head answers twice: with the conditioning, and by what the step shows alone, which no words can speak against.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from saferedir_torch.config import SafetyConfig

#: What a word says before training: nothing, even when 77 of them are pooled.
QUIET = -8.0
#: Noise shares at which what depends on the noise level bends: it is linear between them.
KNOTS = 9


class Step(NamedTuple):
    """What a step shows, B requests."""

    #: z as the denoiser sees it, [B, C, h, w].
    latent: Tensor
    #: The estimate of the finished picture that the step before made, zero where there is none, [B, C, h, w].
    estimate: Tensor
    #: Noise share of the step's level, 0 of a clean picture and 1 of noise, [B].
    share: Tensor


class Answers(NamedTuple):
    """Log-odds, [B, concepts] each."""

    #: With the conditioning: by the whole of it, or by a word.
    told: Tensor
    #: By what the step shows alone.
    shown: Tensor
    #: The two parts of `told`, not centred: what the whole of the conditioning says, and what single words do.
    whole: Tensor
    words: Tensor


def bends(share: Tensor) -> Tensor:
    """Noise shares [B] -> [B, KNOTS], how far each is above each knot; a linear function of it is linear between knots."""
    knots = torch.arange(KNOTS, device=share.device, dtype=share.dtype) / KNOTS
    return torch.relu(share[:, None] - knots)


def halves(both: Tensor) -> tuple[Tensor, Tensor]:
    """[2 B, ...] -> the first B and the others.

    In an exported graph by ONNX's Split, which is told no bounds: those of a slice would be computed on the host, and end the
    capture of a step in a CUDA graph.
    """
    if torch.compiler.is_exporting():
        shape = (both.shape[0] // 2, *both.shape[1:])
        first, second = torch.onnx.ops.symbolic_multi_out(
            "Split", [both], {"axis": 0, "num_outputs": 2}, dtypes=(both.dtype,) * 2, shapes=(shape,) * 2, version=18
        )
    else:
        first, second = both.chunk(2)
    return first, second


def means(features: Tensor) -> Tensor:
    """Of channels [B, C, h, w] -> [B, C, 1, 1].

    In an exported graph by ONNX's GlobalAveragePool, which ONNX Runtime computes in the layout of its convolutions, and not by
    ReduceMean, before and after which it copies all channels to another.
    """
    if torch.compiler.is_exporting():
        pooled: Tensor = torch.onnx.ops.symbolic(
            "GlobalAveragePool", [features], dtype=features.dtype, shape=(*features.shape[:2], 1, 1), version=1
        )
        return pooled
    return features.mean(dim=(2, 3), keepdim=True)


class Convolution(nn.Module):
    """A convolution and its norm, which is batch normalisation in training and folded into the weights afterwards."""

    def __init__(self, before: int, after: int, size: int, *, stride: int = 1) -> None:
        super().__init__()
        self.weights = nn.Conv2d(before, after, size, stride=stride, padding=size // 2)
        self.norm: nn.Module = nn.Identity()

    def forward(self, features: Tensor) -> Tensor:
        """[B, before, h, w] -> [B, after, h / stride, w / stride]."""
        normed: Tensor = self.norm(self.weights(features))
        return normed


def add_norms(module: nn.Module) -> None:
    """Normalise by batches after each convolution of `module`, for training."""
    for part in module.modules():
        if isinstance(part, Convolution):
            part.norm = nn.BatchNorm2d(part.weights.out_channels).to(part.weights.weight.device)


@torch.no_grad()
def fold_norms(module: nn.Module) -> None:
    """Fold the norms of `module` into the convolutions before them, by what they saw in training."""
    for part in module.modules():
        if isinstance(part, Convolution) and isinstance(part.norm, nn.BatchNorm2d):
            part.weights = nn.utils.fusion.fuse_conv_bn_eval(part.weights.eval(), part.norm.eval())
            part.norm = nn.Identity()


class SqueezeExcitation(nn.Module):
    """Scales each channel by a gate computed from all channels' means (Hu et al. 2018)."""

    def __init__(self, channels: int, reduction: int = 8) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(channels, channels // reduction, 1)
        self.excite = nn.Conv2d(channels // reduction, channels, 1)

    def forward(self, features: Tensor) -> Tensor:
        """[B, C, h, w] -> the same shape."""
        gates = torch.sigmoid(self.excite(torch.relu(self.squeeze(means(features)))))
        return features * gates


class Stage(nn.Module):
    """Two 3x3 convolutions, the first of which halves, gated by squeeze-and-excitation, beside a 1x1 shortcut."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.first = Convolution(before, after, 3, stride=2)
        self.second = Convolution(after, after, 3)
        self.gate = SqueezeExcitation(after)
        self.shortcut = Convolution(before, after, 1, stride=2)

    def forward(self, features: Tensor) -> Tensor:
        """[B, before, h, w] -> [B, after, h / 2, w / 2]."""
        hidden = self.gate(self.second(torch.relu(self.first(features))))
        return torch.relu(hidden + self.shortcut(features))


class StepEncoder(nn.Module):
    """What a step shows, whatever the conditioning, for all concepts.

    Latent and estimate are looked at together, at their own resolution first: a thing that stands beside another is a few
    latents wide, and the maximum over places finds it wherever it is.
    """

    def __init__(self, config: SafetyConfig) -> None:
        super().__init__()
        first, second, third = config.convolutions
        self.stem = Convolution(2 * config.latent_channels, first, 3)
        self.stages = nn.Sequential(Stage(first, second), Stage(second, third))
        self.project = nn.Linear(2 * third + KNOTS, config.features)

    def forward(self, step: Step, above: Tensor) -> Tensor:
        """-> j [2 B, features], every request twice, once for each answer of the head; `above` [B, KNOTS] as from `bends`."""
        features = self.stages(torch.relu(self.stem(torch.cat([step.latent, step.estimate], dim=1))))
        shown = torch.cat([features.mean(dim=(2, 3)), features.amax(dim=(2, 3)), above], dim=1)
        joint: Tensor = torch.relu(self.project(torch.cat([shown, shown])))
        return joint


class Conditioning(nn.Module):
    """Tokens of all streams at one width."""

    def __init__(self, config: SafetyConfig) -> None:
        super().__init__()
        self.project = nn.ModuleList(nn.Linear(stream.width, config.features) for stream in config.streams)
        self.mix = nn.Linear(config.features, config.features)

    def forward(self, streams: Sequence[Tensor]) -> Tensor:
        """Streams [R, T_k, D_k] -> tokens [R, T, features]."""
        parts = [self._read(project, stream) for project, stream in zip(self.project, streams, strict=True)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def _read(self, project: nn.Module, stream: Tensor) -> Tensor:
        tokens = torch.relu(project(stream.flatten(0, 1)))  # as rows: a graph then adds biases within the products
        mixed = tokens + torch.relu(self.mix(tokens))
        return mixed.reshape(-1, stream.shape[1], mixed.shape[1])


class Context(nn.Module):
    """What the tokens say at two scales: attended to by what the step shows, a query a head, and each feature's maximum.

    With a single query a head no keys or values are needed per token: the query is compared with the tokens as they are.
    """

    def __init__(self, config: SafetyConfig) -> None:
        super().__init__()
        width, self.heads = config.features, config.heads
        self.scale = 1 / math.sqrt(width)
        self.query = nn.Linear(width, config.heads * width)
        self.fuse = nn.Linear((config.heads + 1) * width, width)

    def forward(self, joint: Tensor, tokens: Tensor) -> Tensor:
        """j [R, features], tokens [R, T, features] -> [R, features]."""
        query = self.query(joint).reshape(joint.shape[0], self.heads, -1)
        weights = torch.softmax(query @ tokens.transpose(1, 2) * self.scale, dim=-1)  # [R, heads, T]
        scales = torch.cat([(weights @ tokens).flatten(1), tokens.amax(dim=1)], dim=1)
        context: Tensor = torch.relu(self.fuse(scales))
        return context


class Detector(nn.Module):
    """The head that answers twice, and a say for every single word, which what stands beside it cannot drown."""

    def __init__(self, config: SafetyConfig, concepts: int) -> None:
        super().__init__()
        width = config.features
        #: In place of a context where the conditioning is left out.
        self.nothing = nn.Parameter(torch.zeros(1, width))
        self.trunk = nn.Linear(2 * width, width)
        self.head = nn.Linear(width, concepts)
        self.words = nn.Linear(width, concepts)
        nn.init.constant_(self.words.bias, QUIET)

    def forward(self, joint: Tensor, context: Tensor, tokens: Tensor) -> Answers:
        """j [2 B, features], context [B, features] of what is drawn, tokens [B, T, features] of the conditioning in force.

        Words are read as they are: what guidance makes of one alone, against whatever stands at its place in a negative prompt,
        can be anything.
        """
        nothing = torch.zeros_like(context) + self.nothing
        logits = self.head(torch.relu(self.trunk(torch.cat([joint, torch.cat([context, nothing])], dim=1))))
        told, shown = halves(logits)
        words = self.words(tokens).transpose(1, 2)  # sums over the last axis alone are the same in any batch, to the bit
        either = torch.logsumexp(torch.cat([told[:, :, None], words], dim=2), dim=2)  # log(exp(a) + exp(b) + ...), an "or"
        return Answers(either, shown, told, torch.logsumexp(words, dim=2))
