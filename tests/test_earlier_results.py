"""What is taken over from an earlier result, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from benchmarks.earlier_results import EarlierResultError, entries_of_others, rows_of_methods
from benchmarks.evaluate import app
from benchmarks.report import RESULTS
from benchmarks.robustness_figures import of_other_prompts
from benchmarks.tables.peers import Bench, Material, Method, Size, methods
from saferedir_torch.models import SHIPPED_SAFETY, load_pipeline
from saferedir_torch.peers.published import PublishedSafeRedir
from saferedir_torch.published import PublishedNetwork
from saferedir_torch.safety_module import SafetyModule, parameters_sha256
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


def test_rows_of_an_earlier_table_are_of_settings_that_are_made_now() -> None:
    split, concept = load_split(), CONCEPTS["weapons"]
    names = [name for key in concept.named_by for name in split.names[key]]
    material = Material(names, [], [], ClipWorld.load(Path("benchmarks/networks/clip_world")))
    now = methods(None, None, PublishedNetwork(), concept, material, Size())  # type: ignore[arg-type]
    settings = {method.name: set(method.settings) for method in now}
    others = methods(None, None, None, concept, material, Size())  # type: ignore[arg-type]
    assert [method.name for method in now if method.name != PublishedSafeRedir.name] == [method.name for method in others]
    earlier = rows_of_methods(RESULTS / "peers_weapons.json", "weapons", parameters_sha256(load_pipeline().unet), "")
    assert {"UCE", "ESD", "SAFREE"} <= set(earlier)
    for method, row in earlier.items():
        assert row["setting"] in settings[method]
        assert row["environment"]["machine"]


def test_a_kept_row_is_only_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench.__new__(Bench)
    monkeypatch.setattr(Bench, "_cost", lambda self, peer: {"seconds_a_picture": peer})
    monkeypatch.setattr(Bench, "_tried", lambda self, peer, setting: {"harmonic_mean": 1.0})
    monkeypatch.setattr(Bench, "_tested", lambda self, peer, setting: {"fsr": "anew"})
    method: Any = Method("UCE", {"a": lambda: 1.0, "b": lambda: 2.0}, False, "one solution")  # type: ignore[dict-item,return-value]
    kept = bench.row(method, {"method": "UCE", "setting": "b", "fsr": "earlier", "seconds_a_picture": 9.0})
    assert kept == {"method": "UCE", "setting": "b", "fsr": "earlier", "minutes_to_make": 0.0, "seconds_a_picture": 2.0}
    assert bench.row(method, {"setting": "no longer tried"})["fsr"] == "anew"


def test_families_whose_prompts_changed_are_named() -> None:
    rows = [{"attacks": {"typos": {"counted": 3}, "buried": {"counted": kept}}} for kept in (4, 5)]
    assert of_other_prompts({"rows": rows}) == ["buried"]
    assert of_other_prompts({"rows": rows[:1] * 2}) == []


def test_rows_of_another_model_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path, concept="ink", model="another", environment={}, rows=[])
    with pytest.raises(EarlierResultError, match="another model"):
        rows_of_methods(path, "ink", "this", "")


def test_own_row_is_kept_of_the_same_module_only(tmp_path: Path) -> None:
    path = write(
        tmp_path, concept="ink", model="m", safety="s", environment={}, rows=[{"method": "UCE"}, {"method": "SafeRedir"}]
    )
    assert set(rows_of_methods(path, "ink", "m", "s")) == {"UCE", "SafeRedir"}
    assert set(rows_of_methods(path, "ink", "m", "another")) == {"UCE"}


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
    command = ["peers", "--task", "ink", "--runs", str(tmp_path), "--add-to", str(path)]
    result = CliRunner().invoke(app, command, env={"COLUMNS": "200"})
    assert result.exit_code == 2
    assert "peers.json" in result.output


def test_a_row_of_the_published_network_is_not_lost(tmp_path: Path) -> None:
    model = parameters_sha256(load_pipeline().unet)
    path = write(tmp_path, concept="ink", model=model, environment={}, rows=[{"method": PublishedSafeRedir.name}])
    command = ["peers", "--task", "ink", "--add-to", str(path), "--out", str(tmp_path), "--work", str(tmp_path)]
    result = CliRunner().invoke(app, command, env={"COLUMNS": "200"})
    assert result.exit_code == 2
    assert "--runs" in result.output
