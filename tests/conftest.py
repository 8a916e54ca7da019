"""Fixtures: the embedded bundle on the CPU, and the eager models it was made of."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cpu_time import CpuTime
from traced_once import keep_operators, traced_once

from saferedir.engines.bundle import DEFAULT_BUNDLE, file_sha256, locate
from saferedir.engines.manifest import MANIFEST_FILE
from saferedir.export import onnx_export
from saferedir.runtime import Pipeline, SafetyPolicy

#: Files that take longest, to be begun first where several processes share the work.
LONGEST = (
    "test_evaluation.py", "test_export.py", "test_training.py", "test_half.py", "test_families.py", "test_import_published.py",
    "test_plans.py", "test_model_changes.py",
)  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    """Tests say what they cost. Of several processes each keeps to a core of its own, so that none waits for another's."""
    config.pluginmanager.register(CpuTime())
    worker = os.environ.get("PYTEST_XDIST_WORKER", "")
    if worker and hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, everything else as it was."""
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


#: Every picture fires with this policy, again and again.
ALWAYS_FIRES = SafetyPolicy(thresholds={"church": 0.0})


@pytest.fixture(scope="session", autouse=True)
def traces(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Each graph is traced once, by whichever process needs it first."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    with pytest.MonkeyPatch.context() as patch:
        keep_operators(patch)
        patch.setattr(onnx_export, "_traced", traced_once(onnx_export._traced, shared / "traces"))
        yield


@pytest.fixture(scope="session")
def pipeline() -> Pipeline:
    """The embedded bundle under its own policy."""
    return Pipeline.from_bundle()


@pytest.fixture(scope="session")
def always_fires(pipeline: Pipeline) -> Pipeline:
    """The same engines, with thresholds that every score reaches."""
    return Pipeline(pipeline.bundle, pipeline.backend, ALWAYS_FIRES)


@pytest.fixture(scope="session")
def unprotected(pipeline: Pipeline) -> Pipeline:
    """The same engines without safety."""
    return Pipeline(pipeline.bundle, pipeline.backend, SafetyPolicy(unprotected=True))


@pytest.fixture
def bundle_copy(tmp_path: Path) -> Path:
    """A copy of the embedded bundle that a test may damage."""
    return Path(shutil.copytree(locate(DEFAULT_BUNDLE), tmp_path / "bundle"))


Edit = Callable[[Path, Callable[[dict[str, Any]], None]], None]


@pytest.fixture
def edit_manifest() -> Edit:
    """Changes a bundle's manifest through a function on its parsed JSON."""

    def edit(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
        path = folder / MANIFEST_FILE
        raw = json.loads(path.read_text())
        change(raw)
        path.write_text(json.dumps(raw))

    return edit


@pytest.fixture
def rehash() -> Callable[[Path, str], None]:
    """States a changed file's hash in the manifest, as a forger would."""

    def restate(folder: Path, name: str) -> None:
        path = folder / MANIFEST_FILE
        raw = json.loads(path.read_text())
        raw["files"][name] = {"sha256": file_sha256(folder / name), "bytes": (folder / name).stat().st_size}
        path.write_text(json.dumps(raw))

    return restate
