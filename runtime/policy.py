"""What the operator allows, and how far a request may tighten it."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from saferedir.engines.errors import RequestError
from saferedir.engines.manifest import SafetyInfo

log = logging.getLogger("saferedir")

#: The larger of two probabilities exceeds this.
ARGMAX = 0.5


@dataclass(frozen=True, kw_only=True)
class SafetyPolicy:
    """The operator's choices. What is left out comes from the bundle."""

    #: Concepts to look for; None means every concept of the bundle.
    enabled: tuple[str, ...] | None = None
    #: Concept -> score from which on the detector fires, finite, at most 1. What fired once fires again somewhat below it: at
    #: the share of it that the module states as its vigilance.
    thresholds: Mapping[str, float] = field(default_factory=dict)
    #: Concept -> strength of redirection, finite, above 0.
    alpha_scales: Mapping[str, float] = field(default_factory=dict)
    #: Steps during which detection rests after firing, 0 or more.
    cooldown: int | None = None
    #: Draw without any safety. For the operator alone, logged, and stated in every record.
    unprotected: bool = False


@dataclass(frozen=True, kw_only=True)
class Tightening:
    """What a request may ask for: lower thresholds, more strength, more concepts. Never the opposite."""

    enabled: tuple[str, ...] = ()
    thresholds: Mapping[str, float] = field(default_factory=dict)
    alpha_scales: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class ResolvedPolicy:
    """The policy of one request in the engine's terms, one value a concept, in the bundle's order."""

    concepts: tuple[str, ...]
    enabled: npt.NDArray[np.bool_]
    threshold: npt.NDArray[np.float32]
    alpha_scale: npt.NDArray[np.float32]
    cooldown: int
    unprotected: bool
    #: Concepts that have no threshold, since the engine decides by argmax; `threshold` is what amounts to it.
    by_argmax: frozenset[str] = frozenset()

    def tightened(self, request: Tightening | None) -> ResolvedPolicy:
        """This policy as `request` tightens it.

        Raises:
            RequestError: a value is not finite, or would loosen the operator's policy.
        """
        if request is None:
            return self
        _check_names({*request.enabled, *request.thresholds, *request.alpha_scales}, self.concepts)
        _check_thresholds(request.thresholds, self.by_argmax)
        enabled, threshold, alpha_scale = self.enabled.copy(), self.threshold.copy(), self.alpha_scale.copy()
        for index, concept in enumerate(self.concepts):
            enabled[index] |= concept in request.enabled
            lower = request.thresholds.get(concept, float(threshold[index]))
            stronger = request.alpha_scales.get(concept, float(alpha_scale[index]))
            if not math.isfinite(lower) or lower > float(threshold[index]):
                raise RequestError(
                    f"threshold of {concept!r} is {lower}; a request may only lower it below {threshold[index]:g}"
                )
            if not math.isfinite(stronger) or stronger < float(alpha_scale[index]):
                raise RequestError(
                    f"alpha_scale of {concept!r} is {stronger}; a request may only raise it above {alpha_scale[index]:g}"
                )
            threshold[index], alpha_scale[index] = lower, stronger
        return replace(self, enabled=enabled, threshold=threshold, alpha_scale=alpha_scale)


def resolve(policy: SafetyPolicy, safety: SafetyInfo) -> ResolvedPolicy:
    """The operator's policy in the terms of this bundle; logs whatever weakens the safety.

    Raises:
        RequestError: a concept is unknown, or a value is out of range.
    """
    names = tuple(concept.name for concept in safety.concepts)
    _check_names({*(policy.enabled or ()), *policy.thresholds, *policy.alpha_scales}, names)
    by_argmax = frozenset(concept.name for concept in safety.concepts if concept.threshold is None)
    _check_thresholds(policy.thresholds, by_argmax)
    cooldown = safety.cooldown if policy.cooldown is None else policy.cooldown
    if not 0 <= cooldown <= 1000:
        raise RequestError(f"cooldown is {cooldown}; expected 0 to 1000 steps")
    calibrated = {c.name: ARGMAX if c.threshold is None else c.threshold for c in safety.concepts}
    threshold = np.array([policy.thresholds.get(name, calibrated[name]) for name in names], np.float32)
    alpha_scale = np.array([policy.alpha_scales.get(c.name, c.alpha_scale) for c in safety.concepts], np.float32)
    for name, value in zip(names, threshold, strict=True):
        if not (math.isfinite(value) and value <= 1):
            raise RequestError(f"threshold of {name!r} is {value}; expected a finite value of at most 1")
    for name, value in zip(names, alpha_scale, strict=True):
        if not (math.isfinite(value) and value > 0):
            raise RequestError(f"alpha_scale of {name!r} is {value}; expected a finite value above 0")
    enabled = np.array([policy.enabled is None or name in policy.enabled for name in names])
    if policy.unprotected:
        log.warning("safety is switched OFF by the operator's policy: pictures are drawn unprotected")
    elif not enabled.all():
        off = [name for name, on in zip(names, enabled, strict=True) if not on]
        log.warning("the operator's policy does not look for: %s", ", ".join(off))
    return ResolvedPolicy(names, enabled, threshold, alpha_scale, cooldown, policy.unprotected, by_argmax)


def _check_thresholds(asked: Mapping[str, float], by_argmax: frozenset[str]) -> None:
    if without := sorted(by_argmax & set(asked)):
        raise RequestError(f"{', '.join(without)} has no threshold; the safety of this bundle decides by argmax")


def _check_names(asked: set[str], known: tuple[str, ...]) -> None:
    unknown = sorted(asked - set(known))
    if unknown:
        raise RequestError(f"unknown concept {', '.join(map(repr, unknown))}; this bundle knows {', '.join(known)}")
