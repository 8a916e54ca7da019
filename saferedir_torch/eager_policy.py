"""What the operator of a protected pipeline chooses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from saferedir.engines.errors import RequestError
from saferedir.engines.policy_checks import check_cooldown, check_enabled, check_numbers, check_ranges
from saferedir_torch.config import SafetyConfig
from saferedir_torch.controller import Policy
from saferedir_torch.safety_module import SafetyModule

#: The threshold of a concept that is not looked for: no score reaches it.
NEVER = 2.0


class Choices(NamedTuple):
    """The policy in force. Concepts are in the module's order."""

    #: Concepts that are looked for.
    enabled: tuple[str, ...]
    #: Concept -> score from which on it fires, of every concept of the module.
    thresholds: dict[str, float]
    #: Steps of rest after firing.
    cooldown: int

    def tensors(self, batch: int, device: torch.device) -> Policy:
        """The same for `batch` requests, in the controller's terms."""
        effective = [theta if concept in self.enabled else NEVER for concept, theta in self.thresholds.items()]
        return Policy(
            period=torch.full((batch,), self.cooldown, dtype=torch.int32, device=device),
            threshold=torch.tensor(effective, device=device).expand(batch, -1),
        )


@dataclass(frozen=True, kw_only=True)
class EagerPolicy:
    """The operator's choices; what is left out comes from the safety module's configuration."""

    #: Concepts to look for, at least one; None means all.
    enabled: Sequence[str] | None = None
    #: Concept name -> threshold, finite, at most 1.
    thresholds: Mapping[str, float] = field(default_factory=dict)
    #: K, steps of rest after firing, 0 to 1000.
    cooldown: int | None = None

    def choices(self, config: SafetyConfig) -> Choices:
        """The policy in force with a module of this configuration.

        Raises:
            RequestError: a concept is unknown, a value is out of range, or nothing is looked for.
        """
        known = tuple(config.concept_names)
        check_enabled(self.enabled, known)
        if self.enabled is not None and not len(self.enabled):
            raise RequestError("enabled is empty, and looking for nothing is not protection; name concepts, or leave it out")
        check_numbers("thresholds", self.thresholds, known)
        check_ranges(self.thresholds, {})
        check_cooldown(self.cooldown)
        return Choices(
            enabled=tuple(name for name in known if self.enabled is None or name in self.enabled),
            thresholds={own.name: float(self.thresholds.get(own.name, own.threshold)) for own in config.concepts},
            cooldown=config.cooldown if self.cooldown is None else int(self.cooldown),
        )

    def resolve(self, module: SafetyModule, batch: int, device: torch.device) -> Policy:
        """The policy of `batch` requests as tensors.

        Raises:
            RequestError: as `choices` does.
        """
        return self.choices(module.config).tensors(batch, device)
