"""What is taken over from an earlier result, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from benchmarks.earlier_results import EarlierResultError, entries_of_others, tried_settings
from benchmarks.evaluate import app
from benchmarks.report import RESULTS
from benchmarks.tables.peers import QUICK, Material, methods
from saferedir_torch.models import SHIPPED_SAFETY
from saferedir_torch.published import PublishedNetwork
from saferedir_torch.safety_module import SafetyModule
from saferedir_torch.world.clip_world import ClipWorld
from saferedir_torch.world.prompts import CONCEPTS
from saferedir_torch.world.split import load_split


@pytest.fixture(scope="module")
def module() -> SafetyModule:
    return SafetyModule.load(SHIPPED_SAFETY)


def write(folder: Path, **values: object) -> Path:
    path = folder / "result.json"
    path.write_text(json.dumps(values))
    return path


def test_entries_of_other_models_are_taken_over_with_where_they_were_measured(tmp_path: Path, module: SafetyModule) -> None:
    entries = [{"model": "a", "fsr": 1}, {"model": "b", "fsr": 2}]
    path = write(tmp_path, safety=module.sha256(), environment={"machine": "m"}, entries=entries)
    assert entries_of_others(path, module, ["a", "c"]) == [{"environment": {"machine": "m"}, "model": "b", "fsr": 2}]


def test_settings_are_those_that_are_tried_now() -> None:
    concept = CONCEPTS["weapons"]
    tried = tried_settings(RESULTS / "peers_weapons.json", "weapons")
    now = methods(None, None, PublishedNetwork(), concept, material(), QUICK)  # type: ignore[arg-type]
    assert set(tried["UCE"]) == {setting for method in now if method.name == "UCE" for setting in method.settings}


def material() -> Material:
    split = load_split()
    names = [name for key in CONCEPTS["weapons"].named_by for name in split.names[key]]
    return Material(names, [], [], ClipWorld.load(Path("benchmarks/networks/clip_world")))


@pytest.mark.parametrize(
    ("values", "said"),
    [({"safety": "another", "environment": {}, "entries": []}, "another module"), ({"entries": []}, "'safety'")],
)
def test_another_modules_result_is_refused(tmp_path: Path, module: SafetyModule, values: dict[str, object], said: str) -> None:
    with pytest.raises(EarlierResultError, match=said):
        entries_of_others(write(tmp_path, **values), module, [])


@pytest.mark.parametrize("text", ["", "[]", '{"concept": "church", "rows": []}'])
def test_no_result_of_the_task_is_an_error_of_the_option(tmp_path: Path, text: str) -> None:
    path = tmp_path / "peers.json"
    path.write_text(text)
    command = ["peers", "--task", "ink", "--runs", str(tmp_path), "--settings-from", str(path)]
    result = CliRunner().invoke(app, command, env={"COLUMNS": "200"})
    assert result.exit_code == 2
    assert "peers.json" in result.output
