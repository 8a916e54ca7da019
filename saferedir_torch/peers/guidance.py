"""Peers that steer the prediction and leave model and prompt alone: the negative prompt, and Safe Latent Diffusion."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from saferedir_torch.peers.peer import Batch, Peer


class NegativePrompt(Peer):
    """The concept's words in place of the empty negative prompt, as diffusers has it (guidance: arXiv 2207.12598)."""

    name = "negative prompt"

    def __init__(self, pipeline: Any, words: str, **drawing: Any) -> None:
        """`words` name what is not to be drawn."""
        super().__init__(pipeline, **drawing)
        self.words = words

    def begin(self, prompts: Sequence[str], embeds: Tensor) -> Batch:
        batch = super().begin(prompts, embeds)
        batch.negative = self.encode([self.words]).expand(len(embeds), -1, -1)
        return batch


@dataclass(frozen=True)
class SafetyGuidance:
    """The parameters of Safe Latent Diffusion; `MEDIUM` to `MAX` are the paper's."""

    #: s_S.
    scale: float
    #: lambda.
    threshold: float
    #: delta: steps before anything is steered; momentum builds up from the first.
    warmup: int
    #: s_m.
    momentum_scale: float
    #: beta_m.
    momentum_beta: float


WEAK = SafetyGuidance(200, 0.0, 15, 0.0, 0.0)
MEDIUM = SafetyGuidance(1000, 0.01, 10, 0.3, 0.4)
STRONG = SafetyGuidance(2000, 0.025, 7, 0.5, 0.7)
MAX = SafetyGuidance(5000, 1.0, 0, 0.5, 0.7)


class SafeLatentDiffusion(Peer):
    """Guidance away from a concept where the prediction moves towards it (Schramowski et al. 2023, arXiv 2211.05105).

    With e the prediction without prompt, p with it and c for the concept (equations 3 to 7):

        mu = min(1, |s_S (p - c)|) where p - c < lambda, 0 elsewhere
        gamma = mu (c - e) + s_m nu,   nu' = beta_m nu + (1 - beta_m) gamma
        prediction = e + s_g (p - e - gamma)

    The paper prints max for that min; its released code clamps at 1 from above, which is what its text says.
    """

    name = "Safe Latent Diffusion"

    def __init__(self, pipeline: Any, words: str, parameters: SafetyGuidance = STRONG, **drawing: Any) -> None:
        """`words` name what is not to be drawn."""
        super().__init__(pipeline, **drawing)
        self.words, self.parameters = words, parameters

    def begin(self, prompts: Sequence[str], embeds: Tensor) -> Batch:
        batch = super().begin(prompts, embeds)
        batch.kept["concept"] = self.encode([self.words]).expand(len(embeds), -1, -1)
        return batch

    def guided(self, batch: Batch, index: int, timestep: Tensor, latent: Tensor) -> Tensor:
        own = self.parameters
        without, conditional, concept = self.predict(latent, timestep, batch.negative, batch.embeds, batch.kept["concept"])
        towards = conditional - concept
        mu = torch.where(towards < own.threshold, (own.scale * towards).abs().clamp(max=1), torch.zeros_like(towards))
        momentum = batch.kept.get("momentum", torch.zeros_like(latent))
        gamma = mu * (concept - without) + own.momentum_scale * momentum
        batch.kept["momentum"] = own.momentum_beta * momentum + (1 - own.momentum_beta) * gamma
        steered = gamma if index >= own.warmup else torch.zeros_like(gamma)
        return without + self.guidance_scale * (conditional - without - steered)
