"""The evaluation's quick form: every table is drawn, stored and shown, with a few pictures each."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from benchmarks.evaluate import app
from benchmarks.report import environment

TABLES = (
    "forgetting_church", "forgetting_alone_church", "attacks_church", "gradient_attacks_church", "benign", "unfamiliar",
    "interference", "strength_choice", "cooldown", "added", "words",
)  # fmt: skip


@pytest.fixture(scope="module")
def folders(few_steps: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Of results, and of pictures, after one command has measured all that one task needs."""
    out, work = tmp_path_factory.mktemp("results"), tmp_path_factory.mktemp("pictures")
    options = ["--quick", "--task", "church", "--out", str(out), "--work", str(work)]
    assert CliRunner().invoke(app, ["everything", *options], catch_exceptions=False).exit_code == 0
    return out, work


@pytest.mark.slow
@pytest.mark.parametrize("table", TABLES)
def test_a_table_is_measured_and_stored(folders: tuple[Path, Path], table: str) -> None:
    stored = json.loads((folders[0] / f"{table}.json").read_text())
    assert stored["environment"]["packages"]
    assert len(stored) > 1


@pytest.mark.slow
def test_a_style_is_measured_as_objects_are(folders: tuple[Path, Path]) -> None:
    out, work = folders
    options = ["--quick", "--task", "ink", "--out", str(out), "--work", str(work)]
    assert CliRunner().invoke(app, ["forgetting", *options], catch_exceptions=False).exit_code == 0
    assert (out / "forgetting_ink.json").exists()


@pytest.mark.slow
def test_an_interrupted_table_draws_nothing_twice(folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    out, work = folders
    (out / "benign.json").unlink()

    def refuse(*_: object) -> None:
        raise AssertionError("drawn again")

    monkeypatch.setattr("benchmarks.drawing._collect", refuse)
    CliRunner().invoke(app, ["benign", "--quick", "--out", str(out), "--work", str(work)], catch_exceptions=False)
    assert (out / "benign.json").exists()


@pytest.mark.slow
def test_the_report_shows_every_table(folders: tuple[Path, Path]) -> None:
    out, _ = folders
    assert CliRunner().invoke(app, ["report", "--out", str(out)], catch_exceptions=False).exit_code == 0
    tables = json.loads((out / "report.json").read_text())["tables"]
    assert set(tables) == {*TABLES, "forgetting_ink"}
    assert tables["benign"] == json.loads((out / "benign.json").read_text())
    page = (out / "report.html").read_text()
    for heading in (
        "Is the concept gone?", "Benign prompts", "Several concepts", "Cooldown", "Out of distribution",
        "masks over the words", "A concept added: teddy", "Attacks: church", "Attacks by gradient: church",
    ):  # fmt: skip
        assert heading in page
    assert page.count("data:image/png") >= 8


@pytest.mark.parametrize("command", ["everything", "attacks"])
def test_an_unknown_task_is_named(command: str) -> None:
    said = CliRunner(env={"COLUMNS": "200"}).invoke(app, [command, "--task", "temple"])
    assert said.exit_code == 2
    for word in ("temple", "church", "weapons"):
        assert word in said.output


def test_runs_that_are_not_there_are_named_before_anything_is_drawn(tmp_path: Path) -> None:
    said = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["everything", "--runs", str(tmp_path / "nowhere")])
    assert said.exit_code == 2
    assert "nowhere" in said.output


@pytest.mark.parametrize("script", ["benchmarks/evaluate/__main__.py", "benchmarks/evaluate.py"])
def test_a_command_is_stated_as_it_is_given_again(monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    monkeypatch.setattr("sys.argv", [script, "benign", "--quick"])
    assert environment()["command"] == "python -m benchmarks.evaluate benign --quick"
