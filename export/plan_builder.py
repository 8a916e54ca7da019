"""Plans of a bundle's engines, built ahead of time by TensorRT-RTX (on any machine) or TensorRT (on the GPU it is for)."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from saferedir.engines import Bundle
from saferedir.engines.errors import MissingDependencyError, PlanError, RequestError
from saferedir.engines.manifest import LARGEST_BATCH, kind
from saferedir.engines.plan_cache import PlanCache, PlanKey
from saferedir.engines.step import PLAIN_STEPS
from saferedir.export.room import check_disk
from saferedir.export.source_lines import source_line

#: Builder -> distribution that brings it.
BUILDERS = {"tensorrt-rtx": "tensorrt_rtx", "tensorrt": "tensorrt"}
#: A plan holds its weights in the precision it computes in, twice that of the bundle's files; as much again while it is
#: being written.
ROOM = 4


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """What a plan is built for."""

    builder: str = "tensorrt-rtx"
    #: Smallest, likeliest and largest batch.
    batch: tuple[int, int, int] = (1, 4, 8)
    #: Such as `8.9`. Empty: portable over every card from 8.0 on (TensorRT-RTX), or the card of this machine (TensorRT).
    compute_capabilities: tuple[str, ...] = ()
    #: Without the weights, which are taken from the bundle when the plan is loaded. Needs a GPU to build.
    strip_weights: bool = False

    def check(self) -> None:
        """Raise `RequestError` where a value is out of range."""
        low, likely, high = self.batch
        if self.builder not in BUILDERS:
            raise RequestError(f"target is {self.builder!r}; expected one of {', '.join(BUILDERS)}")
        if not 1 <= low <= likely <= high <= LARGEST_BATCH:
            raise RequestError(
                f"batch is {low}:{likely}:{high}; expected 1 <= smallest <= likeliest <= largest <= {LARGEST_BATCH}"
            )
        for text in self.compute_capabilities:
            if not re.fullmatch(r"\d+\.\d", text):
                raise RequestError(f"compute capability is {text!r}; expected one such as 8.9")
        if self.compute_capabilities and self.builder == "tensorrt":
            raise RequestError("tensorrt builds for the card of this machine; only tensorrt-rtx takes compute capabilities")

    @property
    def named(self) -> dict[str, Any]:
        """The further options, as polygraphy's `CreateConfig` takes them."""
        return {"strip_plan": True} if self.strip_weights else {}


@dataclass(frozen=True)
class BuiltPlan:
    """A plan that is there now."""

    engine: str
    path: Path
    bytes: int
    #: False where it was there before.
    built: bool
    seconds: float
    #: What was there before.
    found: str


def build_plans(
    bundle: Bundle,
    options: PlanOptions,
    cache: PlanCache,
    engines: tuple[str, ...] | None = None,
    *,
    on_plan: Callable[[int, int], None] | None = None,
    on_wait: Callable[[], None] | None = None,
) -> list[BuiltPlan]:
    """Build what `cache` does not have of the plans of `engines`, by default those that draw under safety.

    Raises:
        RequestError: an option is out of range.
        MissingDependencyError: the builder, or polygraphy, is not installed.
        BundleError: the bundle has no such engine.
        PlanError: an engine cannot be built; the message names the node where the builder does.
        OutputError: there is not enough room.
    """
    options.check()
    builder_version = _version(options.builder)
    keys = [
        PlanKey.of(
            bundle,
            engine,
            builder=options.builder,
            builder_version=builder_version,
            batch=options.batch,
            compute_capabilities=options.compute_capabilities,
            options={name: str(value) for name, value in options.named.items()},
        )
        for engine in engines or [name for name in bundle.manifest.engines if kind(name) not in PLAIN_STEPS]
    ]
    plans = []
    for done, key in enumerate(keys):
        if on_plan is not None:
            on_plan(done, len(keys))
        before = cache.look_up(key)
        if before.path is None:
            info, files = bundle.manifest.engines[key.engine], bundle.manifest.files
            needed = ROOM * sum(files[name].bytes for name in (info.file, *info.weights))
            check_disk(cache.folder, needed, f"a plan of {key.engine}")
        path = cache.get_or_build(key, partial(_run_worker, bundle, key, options), on_wait=on_wait)
        details = cache.details(key)
        plans.append(BuiltPlan(key.engine, path, path.stat().st_size, before.path is None, details["seconds"], before.message))
    if on_plan is not None:
        on_plan(len(keys), len(keys))
    return plans


def _run_worker(bundle: Bundle, key: PlanKey, options: PlanOptions, out: Path) -> Mapping[str, Any]:
    """Build in another process, whose end, however it comes, is an exception here at most."""
    info = bundle.manifest.engines[key.engine]
    job = {
        "builder": key.builder,
        "plan": str(out),
        "inputs": [
            {"name": tensor.name, "shapes": [[size if isinstance(d, str) else d for d in tensor.shape] for size in key.batch]}
            for tensor in info.inputs
        ],
        "compute_capabilities": list(key.compute_capabilities),
        "timing_cache": str(out.with_name(f"{key.builder}-{key.builder_version}.timing")),
        "options": options.named,
    }
    with tempfile.TemporaryDirectory() as place:
        # Parsers take paths: a copy for this build alone is what was hashed, whatever happens to the bundle meanwhile.
        graph = bundle.copy_engine(key.engine, Path(place))
        job_file = Path(place) / "plan.job"
        job_file.write_text(json.dumps({**job, "onnx": str(graph)}))
        portable = "1" if key.builder == "tensorrt-rtx" else "0"
        done = subprocess.run(
            [sys.executable, "-m", "saferedir.export.plan_worker", str(job_file)],
            env={**os.environ, "POLYGRAPHY_USE_TENSORRT_RTX": portable},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        result_file = job_file.with_suffix(".result")
        if done.returncode != 0 or not result_file.exists():
            reason = _reason(done.stdout, done.returncode, graph)
            raise PlanError(f"{key.engine} cannot be built by {key.builder}: {reason}")
        result: dict[str, Any] = json.loads(result_file.read_text())
    return result


def _reason(said: str, code: int, graph: Path) -> str:
    """What the builder said was wrong, most telling first; of a node of `graph` also the line of the model's source."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    for pattern in (r"In node \d+ with name", r"Error Code \d+", r"^\[E\]|^\[!\]|Error"):
        if found := [line for line in lines if re.search(pattern, line)]:
            node = re.search(r"In node \d+ with name: (\S+)", found[0])
            source = source_line(graph, node[1]) if node else None
            return re.sub(r"^\[.\] ", "", found[0])[:300] + (f", at {source}" if source else "")
    return f"the builder ended with code {code}" + (f": {lines[-1][:300]}" if lines else "")


def _version(builder: str) -> str:
    try:
        version("polygraphy")
        return version(BUILDERS[builder])
    except PackageNotFoundError as error:
        raise MissingDependencyError(
            f"building for {builder} needs the package {error.name}; install saferedir[tensorrt]"
            + (" and tensorrt itself" if builder == "tensorrt" else "")
        ) from error
