"""Plans: engines compiled ahead of time, kept under everything that they depend on, and never loaded where that differs.

A plan is two files, `<engine>-<digest>.plan` and the same with `.json`, which states its key, size and hash. It is there
when both are. What does not fit is refused by this statement, before any deserialiser sees a byte of it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from enum import Enum
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from platformdirs import user_cache_path

from saferedir.engines.bundle import Bundle, file_sha256
from saferedir.engines.errors import PlanError


@dataclass(frozen=True, kw_only=True)
class PlanKey:
    """Everything that a plan depends on."""

    engine: str
    onnx_sha256: str
    #: Of the weight files that the graph reads, in the manifest's order.
    weights_sha256: tuple[str, ...]
    #: What the graph computes in.
    precision: str
    builder: str
    builder_version: str
    #: Smallest, likeliest and largest batch.
    batch: tuple[int, int, int]
    #: Such as `8.9`; empty where the builder's plan is portable over all that it knows.
    compute_capabilities: tuple[str, ...] = ()
    #: Further options that were set, by name.
    options: tuple[tuple[str, str], ...] = ()

    @classmethod
    def of(
        cls,
        bundle: Bundle,
        engine: str,
        *,
        builder: str,
        builder_version: str,
        batch: tuple[int, int, int],
        compute_capabilities: tuple[str, ...] = (),
        options: Mapping[str, str] | None = None,
    ) -> PlanKey:
        """The key of an engine of `bundle`.

        Raises:
            BundleError: there is no such engine.
        """
        bundle.engine_path(engine)
        info, files = bundle.manifest.engines[engine], bundle.manifest.files
        return cls(
            engine=engine,
            onnx_sha256=files[info.file].sha256,
            weights_sha256=tuple(files[name].sha256 for name in info.weights),
            precision=bundle.manifest.precision.compute,
            builder=builder,
            builder_version=builder_version,
            batch=batch,
            compute_capabilities=compute_capabilities,
            options=tuple(sorted((options or {}).items())),
        )

    @property
    def stem(self) -> str:
        """Name of the plan's files, without their endings."""
        digest = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()
        return f"{self.engine}-{digest[:20]}"

    def differences(self, stated: Mapping[str, Any]) -> list[str]:
        """In what a plan's statement differs from this key, for people."""
        own = json.loads(json.dumps(asdict(self)))
        return [
            f"{field.name} {stated.get(field.name)!r} instead of {own[field.name]!r}"
            for field in fields(self)
            if stated.get(field.name) != own[field.name]
        ]


class PlanStatus(Enum):
    """What a cache has for a key."""

    HIT = "there"
    MISS = "not built yet"
    #: For the same builder and devices, but of another graph, version, profile or option.
    STALE = "stale"
    #: Of another builder, or for other devices.
    FOREIGN = "foreign"
    #: The right one once, but its bytes are not what they were.
    DAMAGED = "damaged"


@dataclass(frozen=True)
class Lookup:
    """What was found; `path` of a hit alone."""

    status: PlanStatus
    path: Path | None
    #: What differs, and what will be done about it.
    message: str


@dataclass(frozen=True)
class FittingPlan:
    """A plan that an engine can be run by."""

    path: Path
    sha256: str
    #: Input -> smallest, likeliest and largest shape.
    profiles: Mapping[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]
    #: Built without its weights, which it has to be given.
    stripped: bool = False

    def read(self) -> bytes:
        """The plan, which has the hash that is stated beside it.

        Raises:
            PlanError: it has not, or cannot be read.
        """
        try:
            data = self.path.read_bytes()
        except OSError as error:
            raise PlanError(f"{self.path} cannot be read: {error}; build it again") from error
        if hashlib.sha256(data).hexdigest() != self.sha256:
            raise PlanError(f"{self.path} does not have the hash that is stated beside it; build it again")
        return data


class PlanCache:
    """The plans in one folder. Safe for several processes: who builds holds a lock, the others wait and take the result."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def look_up(self, key: PlanKey) -> Lookup:
        """What is there for `key`. Reads the statement, and the plan's bytes only to check their hash."""
        plan = self.folder / f"{key.stem}.plan"
        statement = _statement(plan)
        if statement is not None:
            problem = _damage(plan, statement) or ("; ".join(key.differences(statement["key"])) or None)
            if problem is None:
                return Lookup(PlanStatus.HIT, plan, f"{plan}: built for exactly this")
            return Lookup(PlanStatus.DAMAGED, None, f"{plan} {problem}; it is not loaded, and will be built again")
        others = [stated["key"] for path in sorted(self.folder.glob(f"{key.engine}-*.plan")) if (stated := _statement(path))]
        # The nearest of them says most.
        nearest = min(others, key=lambda stated: len(key.differences(stated)), default=None)
        if nearest is None:
            return Lookup(PlanStatus.MISS, None, f"{self.folder} holds no plan of {key.engine}; it will be built")
        foreign = (nearest.get("builder"), nearest.get("compute_capabilities")) != (
            key.builder,
            list(key.compute_capabilities),
        )
        status = PlanStatus.FOREIGN if foreign else PlanStatus.STALE
        differs = "; ".join(key.differences(nearest))
        return Lookup(
            status, None, f"the plan of {key.engine} in {self.folder} is {status.value}: {differs}; another will be built"
        )

    def get_or_build(
        self, key: PlanKey, build: Callable[[Path], Mapping[str, Any]], *, on_wait: Callable[[], None] | None = None
    ) -> Path:
        """The plan of `key`, built by `build(path)` where it is not there; what that returns is kept in the statement.

        Raises:
            PlanError: the folder cannot be written, or whatever `build` raises; nothing is left then.
        """
        if (found := self.look_up(key)).path is not None:
            return found.path
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with _locked(self.folder / f"{key.stem}.lock", on_wait):
                if (found := self.look_up(key)).path is not None:
                    return found.path
                return self._build(key, build)
        except OSError as error:
            raise PlanError(f"{self.folder} cannot hold plans: {error}; name another folder") from error

    def fitting(self, bundle: Bundle, engine: str, builder: str, builder_version: str) -> list[FittingPlan] | str:
        """Plans of the engine as it is in `bundle`, for this builder and version, whatever batch, cards and options they were
        built for; or what is there instead, and how it differs."""
        wanted = PlanKey.of(bundle, engine, builder=builder, builder_version=builder_version, batch=(0, 0, 0))
        free = ("batch", "compute_capabilities", "options")
        near: list[list[str]] = []
        fitting = []
        for plan in sorted(self.folder.glob(f"{engine}-*.plan")):
            if (statement := _statement(plan)) is None:
                continue
            differs = [said for said in wanted.differences(statement["key"]) if not said.startswith(free)]
            if not differs and (problem := _damage(plan, statement)) is not None:
                differs.append(problem)
            if not differs:
                try:
                    fitting.append(_fitting(plan, statement))
                except (KeyError, TypeError, ValueError, AttributeError):
                    differs.append("what is stated beside it does not say which shapes it takes")
            near.append(differs)
        if fitting:
            return fitting
        if not near:
            return f"{self.folder} holds none"
        nearest = min(near, key=len)
        return f"that in {self.folder} differs: {'; '.join(nearest)}"

    def details(self, key: PlanKey) -> Mapping[str, Any]:
        """What `build` returned when the plan of `key` was made.

        Raises:
            PlanError: there is no such plan.
        """
        statement = _statement(self.folder / f"{key.stem}.plan")
        if statement is None:
            raise PlanError(f"{self.folder} holds no plan of {key.engine} for this builder and these options")
        details: Mapping[str, Any] = statement["details"]
        return details

    def _build(self, key: PlanKey, build: Callable[[Path], Mapping[str, Any]]) -> Path:
        plan = self.folder / f"{key.stem}.plan"
        partial = plan.with_suffix(".partial")
        stated_partial = partial.with_suffix(".partial.json")
        try:
            details = build(partial)
            statement = {
                "key": asdict(key),
                "bytes": partial.stat().st_size,
                "sha256": file_sha256(partial),
                "details": dict(details),
            }
            stated_partial.write_text(json.dumps(statement, indent=1) + "\n", encoding="utf-8")
            plan.with_suffix(".json").unlink(missing_ok=True)
            os.replace(partial, plan)
            os.replace(stated_partial, plan.with_suffix(".json"))
        finally:
            for path in (partial, stated_partial):
                path.unlink(missing_ok=True)
        return plan


def user_cache() -> Path:
    """Where plans are kept that are not in the bundle: `saferedir/plans` in the user's cache folder (`$XDG_CACHE_HOME`).

    Raises:
        PlanError: the system knows no such folder, as for a user without a home.
    """
    try:
        folder: Path | None = user_cache_path("saferedir", appauthor=False)
    except RuntimeError:
        folder = None
    if folder is None or not folder.is_absolute():
        raise PlanError("this user has no home folder to keep plans in; set XDG_CACHE_HOME to an absolute folder, or name one")
    return folder / "plans"


def _statement(plan: Path) -> dict[str, Any] | None:
    """What is stated beside `plan`, or None where plan or a readable statement is missing."""
    try:
        raw = json.loads(plan.with_suffix(".json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    whole = isinstance(raw, dict) and isinstance(raw.get("key"), dict) and {"bytes", "sha256", "details"} <= raw.keys()
    return raw if whole and plan.is_file() else None


def _fitting(plan: Path, statement: Mapping[str, Any]) -> FittingPlan:
    profiles = {
        str(name): (tuple(map(int, low)), tuple(map(int, likely)), tuple(map(int, high)))
        for name, (low, likely, high) in statement["details"]["profiles"].items()
    }
    return FittingPlan(plan, str(statement["sha256"]), profiles, ["strip_plan", "True"] in statement["key"]["options"])


def _damage(plan: Path, statement: Mapping[str, Any]) -> str | None:
    size = plan.stat().st_size
    if size != statement["bytes"]:
        return f"has {size} bytes, {statement['bytes']} are stated"
    return None if file_sha256(plan) == statement["sha256"] else "does not have the hash that is stated"


@contextlib.contextmanager
def _locked(path: Path, on_wait: Callable[[], None] | None) -> Iterator[None]:
    """Holds a lock on `path`, which the system lets go of when a process dies."""
    lock = FileLock(path)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        if on_wait is not None:
            on_wait()
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
