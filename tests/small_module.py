"""A safety module of a few thousand parameters, untrained."""

from __future__ import annotations

from typing import Any

import torch

from saferedir_torch.config import Concept, SafetyConfig
from saferedir_torch.safety_module import SafetyModule

TOKENS, WIDTH, CONCEPTS = 9, 16, 3


def small_module(**wishes: Any) -> SafetyModule:
    """The same weights each time, of concepts a, b and c; `wishes` are for its configuration."""
    torch.manual_seed(0)
    config = SafetyConfig(
        latent_channels=4, prompt_tokens=TOKENS, prompt_width=WIDTH, latent_widths=(8, 16, 24), latent_features=24,
        picture_widths=(8, 16, 16), picture_features=12,
        timestep_frequencies=16, timestep_features=8, classifier_width=16, redirector_width=16, adapter_rank=4,
        concepts=tuple(Concept(name=name, replacement="x") for name in "abc"), **wishes,
    )  # fmt: skip
    return SafetyModule(config).eval()


def unknown(latent: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The estimate, and whether there is one, before the first step of requests with latents [B, C, h, w]."""
    return torch.zeros_like(latent), torch.zeros(len(latent), dtype=torch.bool)
