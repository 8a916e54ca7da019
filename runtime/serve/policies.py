"""The operator's policy for a service: a versioned file, by tenant and concept, reloaded while requests are under way.

A version is of one content for ever. A file that cannot be used changes nothing: the policy in force stays, and the problem is
told. Whoever began under a version ends under it.
"""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
from msgspec import Meta, Struct

from saferedir.engines.errors import RequestError
from saferedir.engines.manifest import SafetyInfo
from saferedir.engines.printable import printable
from saferedir.runtime.policy import ResolvedPolicy, SafetyPolicy, resolve

log = logging.getLogger("saferedir")

#: What becomes of a picture in which a concept fires.
Action = Literal["observe", "redirect", "block"]
Name = Annotated[str, Meta(min_length=1, max_length=200)]
#: The tenant of requests without a key, where the service asks for none.
ANYONE = ""


class Rule(Struct, frozen=True, forbid_unknown_fields=True):
    """What is done about one concept."""

    #: `observe`: the picture stays as it is, and what would have fired is counted; `redirect`: the picture is drawn without it;
    #: `block`: the request is cancelled at the first firing, and refused.
    action: Action = "redirect"
    #: Score from which on it fires; the bundle's own where it is left out.
    threshold: Annotated[float, Meta(ge=0, le=1)] | None = None


class PolicyFile(Struct, frozen=True, forbid_unknown_fields=True):
    """The file, as its JSON schema says."""

    # As JSON schema writes patterns: it knows no \A and \Z, and Python's $ passes a line's end by.
    version: Annotated[str, Meta(min_length=1, max_length=100, pattern=r"^[A-Za-z0-9._-]+$(?!\n)")]
    #: Whether pictures are drawn by settings that the safety's promise is not for as well.
    beyond_promise: bool = False
    #: By concept, for all tenants; `redirect` at the bundle's threshold where one is left out.
    concepts: Annotated[dict[Name, Rule], Meta(max_length=1000)] = {}
    #: By tenant: what differs from `concepts`.
    tenants: Annotated[dict[Name, dict[Name, Rule]], Meta(max_length=100_000)] = {}


@dataclass(frozen=True)
class TenantPolicy:
    """The policy of one request."""

    version: str
    #: SHA-256 of the file.
    digest: str
    #: Concept -> what is done about it.
    actions: Mapping[str, Action]
    #: In the engine's terms. What is observed is not looked for by the engine, and has a threshold all the same.
    engine: ResolvedPolicy

    def only_observing(self) -> TenantPolicy:
        """The same, in which nothing is done about what is seen."""
        observed: dict[str, Action] = dict.fromkeys(self.actions, "observe")
        return replace(self, actions=observed, engine=replace(self.engine, enabled=np.zeros_like(self.engine.enabled)))

    def switched_off(self) -> TenantPolicy:
        """Drawn without the safety, as the operator alone may have it."""
        own = self.only_observing()
        return replace(own, engine=replace(own.engine, unprotected=True))

    def tightened(self, engine: ResolvedPolicy) -> TenantPolicy:
        """The same for a request that has tightened the engine's part: what it asks to look for is redirected."""
        looked_for = dict(zip(engine.concepts, engine.enabled, strict=True))
        actions: dict[str, Action] = {
            name: "redirect" if action == "observe" and looked_for[name] else action for name, action in self.actions.items()
        }
        return replace(self, actions=actions, engine=engine)

    def fired(self, fired: np.ndarray[Any, Any]) -> list[str]:
        """The concepts that were redirected: of those under `redirect`, such that some step's `fired` [steps, N] has."""
        return [name for name, action in self._where(np.any(fired, axis=0)).items() if action == "redirect"]

    def observed(self, score: np.ndarray[Any, Any]) -> list[str]:
        """The concepts under `observe` that some step's score [steps, N] reaches."""
        return [name for name, action in self.decisions(score).items() if action == "observe"]

    def decisions(self, score: np.ndarray[Any, Any]) -> dict[str, Action]:
        """What is done about the concepts that some step's score [steps, N] reaches."""
        return self._where(np.any(score >= self.engine.threshold, axis=0))

    def _where(self, seen: np.ndarray[Any, Any]) -> dict[str, Action]:
        return {name: self.actions[name] for n, name in enumerate(self.engine.concepts) if seen[n]}


def schema() -> dict[str, Any]:
    """The JSON schema of a policy file."""
    return msgspec.json.schema(PolicyFile)


class Policies:
    """The policy in force."""

    def __init__(self, safety: SafetyInfo, path: Path | None = None) -> None:
        """Without a file every concept is redirected at the bundle's threshold.

        Raises:
            RequestError: the file cannot be used.
        """
        self._safety, self._path, self._lock = safety, path, threading.Lock()
        #: Version -> SHA-256 of what it was.
        self._known: dict[str, str] = {}
        self.problem: str | None = None
        self._stamp: tuple[int, int] | None = None
        if path is None:
            self._use(PolicyFile(version="built-in"), b"")
        else:
            self._stamp = _stamp(path)
            self._use(*_read(path))

    @property
    def version(self) -> str:
        return self._file.version

    def of(self, tenant: str) -> TenantPolicy:
        """The policy of a tenant, which does not change once it was handed out."""
        with self._lock:
            if tenant not in self._resolved:
                self._resolved[tenant] = self._resolve(self._file, self._digest, tenant)
            return self._resolved[tenant]

    def reload(self) -> bool:
        """Take the file anew if it has changed. Whether another policy is in force now; what is wrong is in `problem`."""
        if self._path is None or (stamp := _stamp(self._path)) == self._stamp:
            return False
        self._stamp = stamp
        before = self._digest
        try:
            self._use(*_read(self._path))
        except RequestError as error:
            self.problem = str(error)
            log.error("the policy stays at version %s: %s", self.version, error)
            return False
        self.problem = None
        return self._digest != before

    def _use(self, file: PolicyFile, data: bytes) -> None:
        digest = hashlib.sha256(data).hexdigest()
        if self._known.get(file.version, digest) != digest:
            raise RequestError(f"version {file.version!r} was another policy before; give what has changed a new version")
        for tenant in (ANYONE, *file.tenants):
            self._resolve(file, digest, tenant)  # refuses what cannot be used before any of it is
        with self._lock:
            self._known[file.version] = digest
            self._file, self._digest, self._resolved = file, digest, dict[str, TenantPolicy]()
        log.info("policy version %s is in force", file.version)

    def _resolve(self, file: PolicyFile, digest: str, tenant: str) -> TenantPolicy:
        names = [concept.name for concept in self._safety.concepts]
        rules = {**file.concepts, **file.tenants.get(tenant, {})}
        unknown = [name for name in rules if name not in names]
        if unknown:
            where = f" of tenant {printable(tenant)!r}" if tenant else ""
            raise RequestError(f"the policy names {printable(unknown[0])!r}{where}; this bundle has {', '.join(names)}")
        every = {name: rules.get(name, Rule()) for name in names}
        thresholds = {name: rule.threshold for name, rule in every.items() if rule.threshold is not None}
        whole = resolve(SafetyPolicy(thresholds=thresholds, beyond_promise=file.beyond_promise), self._safety)
        looked_for = np.array([every[name].action != "observe" for name in names])
        actions = {name: rule.action for name, rule in every.items()}
        return TenantPolicy(file.version, digest, actions, replace(whole, enabled=looked_for))


def _read(path: Path) -> tuple[PolicyFile, bytes]:
    try:
        data = path.read_bytes()
        return msgspec.json.decode(data, type=PolicyFile), data
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror}") from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RequestError(f"{path} is no policy: {error}") from error


def _stamp(path: Path) -> tuple[int, int] | None:
    """What changes when the file does."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size
