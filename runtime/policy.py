"""What the operator allows, and how far a request may tighten it."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from saferedir.engines.errors import RequestError
from saferedir.engines.manifest import Promise, SafetyInfo
from saferedir.engines.policy_checks import check_cooldown, check_enabled, check_numbers, check_ranges

log = logging.getLogger("saferedir")

#: The larger of two probabilities exceeds this.
ARGMAX = 0.5


@dataclass(frozen=True, kw_only=True)
class SafetyPolicy:
    """The operator's choices. What is left out comes from the bundle.

    `Pipeline.from_bundle(policy=...)` checks every value and refuses, by name, what it does not know.
    """

    #: Concepts to look for, at least one; None means every concept of the bundle. What is not listed a request may add.
    enabled: Sequence[str] | None = None
    #: Concept -> score from which on the detector fires, finite, at most 1.
    thresholds: Mapping[str, float] = field(default_factory=dict)
    #: Concept -> strength of redirection, finite, above 0; only of a safety that was published with such a choice.
    alpha_scales: Mapping[str, float] = field(default_factory=dict)
    #: Steps during which detection rests after firing, 0 or more.
    cooldown: int | None = None
    #: Draw with settings that the safety's promise is not for as well: another number of steps, sampler or guidance scale.
    #: Logged, and stated in every record.
    beyond_promise: bool = False
    #: Draw without any safety, in which case nothing else is to be chosen. For the operator alone, logged, and stated in every
    #: record.
    unprotected: bool = False


@dataclass(frozen=True, kw_only=True)
class Tightening:
    """What a request may ask for: lower thresholds, more strength, more concepts. Never the opposite.

    Detection then does not rest after it has fired.
    """

    #: Concepts to look for besides the operator's.
    enabled: Sequence[str] = ()
    #: Concept -> score from which on the detector fires, at most the operator's.
    thresholds: Mapping[str, float] = field(default_factory=dict)
    #: Concept -> strength of redirection, at least the operator's.
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
    beyond_promise: bool = False
    #: Concepts that have no threshold, since the engine decides by argmax; `threshold` is what amounts to it.
    by_argmax: frozenset[str] = frozenset()

    def tightened(self, request: Tightening | None) -> ResolvedPolicy:
        """This policy as `request` tightens it.

        Raises:
            RequestError: a concept or a value's type is not known, or it would loosen the operator's policy; or there is
                nothing to tighten, since the operator draws unprotected.
        """
        if request is None:
            return self
        if not isinstance(request, Tightening):
            raise RequestError(f"tighten is {type(request).__name__}; expected a Tightening")
        _check(request, self.concepts)
        _check_thresholds(request.thresholds, self.by_argmax)
        if self.unprotected:
            raise RequestError("the operator's policy draws unprotected; there is nothing that a request can tighten")
        enabled, threshold, alpha_scale = self.enabled.copy(), self.threshold.copy(), self.alpha_scale.copy()
        for index, concept in enumerate(self.concepts):
            enabled[index] |= concept in request.enabled
            lower = request.thresholds.get(concept, float(threshold[index]))
            stronger = request.alpha_scales.get(concept, float(alpha_scale[index]))
            if concept in request.alpha_scales and not alpha_scale[index]:
                raise RequestError(
                    f"alpha_scale of {concept!r}: the safety of this bundle has no strength to choose; leave it out"
                )
            if lower > float(threshold[index]):
                raise RequestError(
                    f"threshold of {concept!r} is {lower}; a request may only lower it below {threshold[index]:g}"
                )
            if stronger < float(alpha_scale[index]):
                raise RequestError(
                    f"alpha_scale of {concept!r} is {stronger}; a request may only raise it above {alpha_scale[index]:g}"
                )
            threshold[index], alpha_scale[index] = lower, stronger
        if all(np.array_equal(getattr(self, name), new) for name, new in (
            ("enabled", enabled), ("threshold", threshold), ("alpha_scale", alpha_scale),
        )):  # fmt: skip
            return self
        # No rest: what fires only as it was tightened would hide what the operator looks for while detection rests.
        return replace(self, enabled=enabled, threshold=threshold, alpha_scale=alpha_scale, cooldown=0)

    @property
    def looks(self) -> bool:
        """Whether anything is looked for."""
        return not self.unprotected and bool(self.enabled.any())


def resolve(policy: SafetyPolicy, safety: SafetyInfo) -> ResolvedPolicy:
    """The operator's policy in the terms of this bundle; logs whatever weakens the safety.

    Raises:
        RequestError: a concept is unknown, a value is out of range or of another type, or nothing would be looked for.
    """
    names = tuple(concept.name for concept in safety.concepts)
    if not isinstance(policy, SafetyPolicy):
        raise RequestError(f"policy is {type(policy).__name__}; expected a SafetyPolicy")
    _check(policy, names)
    by_argmax = frozenset(concept.name for concept in safety.concepts if concept.threshold is None)
    _check_thresholds(policy.thresholds, by_argmax)
    check_ranges(policy.thresholds, policy.alpha_scales)
    cooldown = safety.cooldown if policy.cooldown is None else policy.cooldown
    calibrated = {c.name: ARGMAX if c.threshold is None else c.threshold for c in safety.concepts}
    threshold = np.array([policy.thresholds.get(name, calibrated[name]) for name in names], np.float32)
    strengths = {c.name: c.alpha_scale for c in safety.concepts}
    if without := [name for name in policy.alpha_scales if strengths[name] is None]:
        raise RequestError(f"alpha_scale of {without[0]!r}: the safety of this bundle has no strength to choose; leave it out")
    alpha_scale = np.array([policy.alpha_scales.get(name, strengths[name] or 0) for name in names], np.float32)
    enabled = np.array([policy.enabled is None or name in policy.enabled for name in names])
    if policy.unprotected:
        log.warning("safety is switched OFF by the operator's policy: pictures are drawn unprotected")
    elif not enabled.all():
        off = [name for name, on in zip(names, enabled, strict=True) if not on]
        log.warning("the operator's policy does not look for: %s", ", ".join(off))
    return ResolvedPolicy(
        names, enabled, threshold, alpha_scale, cooldown, policy.unprotected, policy.beyond_promise, by_argmax
    )


def check_promise(
    policy: ResolvedPolicy, promise: Promise | None, *, steps: int, sampler: str, guidance_scale: float
) -> bool | None:
    """Whether the safety's promise is for these settings; None where there is no promise, or no safety.

    Raises:
        RequestError: it is not, and the operator's policy does not allow it.
    """
    if promise is None or policy.unprotected:
        return None
    refused = promise.envelope.refuses(steps=steps, sampler=sampler, guidance_scale=max(1.0, guidance_scale))
    if refused and not policy.beyond_promise:
        raise RequestError(
            f"{refused}: what the safety was made and calibrated for. Elsewhere it promises nothing; an operator who wants to "
            "draw all the same allows it by beyond_promise of the policy (--beyond-promise)"
        )
    if refused:
        log.warning("drawn beyond what the safety promises for, as the operator allows: %s", refused)
    return not refused


def _check_thresholds(asked: Mapping[str, float], by_argmax: frozenset[str]) -> None:
    if without := sorted(by_argmax & set(asked)):
        raise RequestError(f"{', '.join(without)} has no threshold; the safety of this bundle decides by argmax")


def _check(asked: SafetyPolicy | Tightening, known: tuple[str, ...]) -> None:
    """Raise `RequestError` where a value is of another type than its field's, or a concept is unknown."""
    check_enabled(asked.enabled, known)
    for name in ("thresholds", "alpha_scales"):
        check_numbers(name, getattr(asked, name), known)
    if isinstance(asked, Tightening):
        return
    for name in ("unprotected", "beyond_promise"):
        if not isinstance(getattr(asked, name), bool):
            raise RequestError(f"{name} is {getattr(asked, name)!r}; expected True or False")
    check_cooldown(asked.cooldown)
    if asked.unprotected and asked != SafetyPolicy(unprotected=True):
        raise RequestError("unprotected draws without any safety; leave everything else out")
    if asked.enabled is not None and not len(asked.enabled):
        raise RequestError(
            "enabled is empty, and looking for nothing is not protection; name concepts, or set unprotected to draw without"
        )
