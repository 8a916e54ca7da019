"""Fixtures: the embedded bundle on the CPU, and the eager models it was made of."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from cpu_time import CpuTime
from small_module import telling_module
from traced_once import keep_operators, traced_once

from benchmarks.drawing import Setting
from benchmarks.small_pipeline import SMALL
from saferedir.engines.bundle import DEFAULT_BUNDLE, file_sha256, locate
from saferedir.engines.manifest import MANIFEST_FILE
from saferedir.export import onnx_export
from saferedir.runtime import Pipeline, SafetyPolicy
from saferedir_torch.models import load_pipeline
from saferedir_torch.new_module import new_module
from saferedir_torch.peers.peer import Peer
from saferedir_torch.safety_module import SafetyModule

#: Files that take longest, to be begun first where several processes share the work; those that trace graphs by one of them.
LONGEST = (
    "test_evaluation.py", "test_export.py", "test_half.py", "test_sizes.py", "test_model_changes.py", "test_plans.py",
    "test_families.py", "test_import_published.py",
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
ALWAYS_FIRES = SafetyPolicy(thresholds={"church": 0.0}, beyond_promise=True)


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
    """The embedded bundle under its own policy, in as few steps as may be."""
    return Pipeline.from_bundle(policy=SafetyPolicy(beyond_promise=True))


@pytest.fixture(scope="module")
def eager() -> Any:
    """The embedded model in diffusers."""
    return load_pipeline()


@pytest.fixture(scope="module")
def safety(eager: Any) -> SafetyModule:
    """A small module that fits it, and fires where a prompt names a church."""
    return telling_module(eager)


@pytest.fixture
def pipe(eager: Any) -> Any:
    """A pipeline object of the test's own."""
    return copy.copy(eager)


#: How many cases a training in the tests looks at, by module and name.
SMALL_BATCHES = {
    "learner": {"STEP_BATCH": 24, "PAIR_BATCH": 16, "VALIDATION_STEPS": 60, "VALIDATION_PAIRS": 20},
    "runs": {"UNSAFE": 2, "REWRITES": 1, "BENIGN": 2, "SWITCHED": 1, "RUNS": 6, "PART": 2},
    "world.base": {"BATCH": 4, "SAMPLE_PROMPTS": ["a church", "a cat"]},
    "world.clip": {"BATCH": 4},
    "world.denoiser_training": {"BATCH": 4, "SAMPLE_PROMPTS": ["a church", "a cat"]},
    "world.fine_tuning": {"BATCH": 4},
    "world.vae": {"BATCH": 2, "SCALED_ON": 8},
}  # fmt: skip


@pytest.fixture(scope="module")
def small_training() -> Iterator[None]:
    """Within, trainings are of small modules, by small batches."""
    with pytest.MonkeyPatch.context() as patch:
        for module, sizes in SMALL_BATCHES.items():
            for name, size in sizes.items():
                patch.setattr(f"saferedir_torch.{module}.{name}", size)
        patch.setattr("saferedir_torch.train.new_module", partial(new_module, **SMALL))
        yield


@pytest.fixture(scope="module")
def few_steps() -> Iterator[None]:
    """Within, pictures are drawn in four steps where nobody says in how many."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(Pipeline.__call__.__kwdefaults__, "num_inference_steps", 4)
        patch.setattr("benchmarks.drawing.USUAL", Setting(4))
        patch.setitem(Peer.__init__.__kwdefaults__, "steps", 4)
        patch.setattr("benchmarks.tables.transfer.USUAL", (4, 5.0))
        yield


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
