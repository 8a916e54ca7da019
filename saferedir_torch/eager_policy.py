"""What the operator of a protected pipeline chooses."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from saferedir.engines.errors import RequestError
from saferedir_torch.config import SafetyConfig
from saferedir_torch.controller import Policy
from saferedir_torch.safety_module import SafetyModule

#: Steps of rest after firing, at most.
LONGEST_COOLDOWN = 1000


class Choices(NamedTuple):
    """The policy in force. Concepts are in the module's order."""

    #: Concepts that are looked for.
    enabled: tuple[str, ...]
    #: Concept -> score from which on it fires, of every concept of the module.
    thresholds: dict[str, float]
    #: Concept -> strength of redirection, of every concept of the module.
    alpha_scales: dict[str, float]
    #: Steps of rest after firing.
    cooldown: int

    def tensors(self, batch: int, device: torch.device) -> Policy:
        """The same for `batch` requests, in the controller's terms."""
        enabled = [concept in self.enabled for concept in self.thresholds]
        return Policy(
            period=torch.full((batch,), self.cooldown, dtype=torch.int32, device=device),
            enabled=torch.tensor(enabled, device=device).expand(batch, -1),
            threshold=torch.tensor(list(self.thresholds.values()), device=device).expand(batch, -1),
            alpha_scale=torch.tensor(list(self.alpha_scales.values()), device=device).expand(batch, -1),
        )


@dataclass(frozen=True, kw_only=True)
class EagerPolicy:
    """The operator's choices; what is left out comes from the safety module's configuration."""

    #: Concepts to look for, at least one; None means all.
    enabled: tuple[str, ...] | None = None
    #: Concept name -> threshold, finite, at most 1.
    thresholds: Mapping[str, float] = field(default_factory=dict)
    #: Concept name -> alpha_scale, finite, above 0.
    alpha_scales: Mapping[str, float] = field(default_factory=dict)
    #: K, steps of rest after firing, 0 to 1000.
    cooldown: int | None = None

    def choices(self, config: SafetyConfig) -> Choices:
        """The policy in force with a module of this configuration.

        Raises:
            RequestError: a concept is unknown, a value is out of range, or nothing is looked for.
        """
        known = tuple(config.concept_names)
        if unknown := sorted({*(self.enabled or ()), *self.thresholds, *self.alpha_scales} - set(known)):
            raise RequestError(f"unknown concept {', '.join(map(repr, unknown))}; this module knows {', '.join(known)}")
        if self.enabled is not None and not self.enabled:
            raise RequestError(f"enabled is empty, so that nothing is looked for; name some of {', '.join(known)}")
        for concept, threshold in self.thresholds.items():
            if not (_finite(threshold) and threshold <= 1):
                raise RequestError(f"threshold of {concept!r} is {threshold!r}; expected a finite value of at most 1")
        for concept, alpha_scale in self.alpha_scales.items():
            if not (_finite(alpha_scale) and alpha_scale > 0):
                raise RequestError(f"alpha_scale of {concept!r} is {alpha_scale!r}; expected a finite value above 0")
        cooldown = config.cooldown if self.cooldown is None else self.cooldown
        if type(cooldown) is not int or not 0 <= cooldown <= LONGEST_COOLDOWN:
            raise RequestError(f"cooldown is {cooldown!r}; expected 0 to {LONGEST_COOLDOWN} steps")
        return Choices(
            enabled=tuple(name for name in known if self.enabled is None or name in self.enabled),
            thresholds={own.name: float(self.thresholds.get(own.name, own.threshold)) for own in config.concepts},
            alpha_scales={own.name: float(self.alpha_scales.get(own.name, own.alpha_scale)) for own in config.concepts},
            cooldown=cooldown,
        )

    def resolve(self, module: SafetyModule, batch: int, device: torch.device) -> Policy:
        """The policy of `batch` requests as tensors.

        Raises:
            RequestError: as `choices` does.
        """
        return self.choices(module.config).tensors(batch, device)


def _finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
