"""The evaluation's quick form: every table is drawn, stored and shown, with a few pictures each."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from benchmarks.evaluate import app
from benchmarks.readme import figures
from benchmarks.report import environment
from benchmarks.summary_figures import works

TABLES = (
    "envelope", "unfamiliar", "settings", "amplified", "forgetting_church", "attacks_church_4_steps", "interference",
    "added", "ablation", "words",
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
    (out / "envelope.json").unlink()

    def refuse(*_: object) -> None:
        raise AssertionError("drawn again")

    monkeypatch.setattr("benchmarks.drawing._collect", refuse)
    monkeypatch.setattr("benchmarks.first_step._heard", refuse)
    CliRunner().invoke(app, ["envelope", "--quick", "--out", str(out), "--work", str(work)], catch_exceptions=False)
    assert (out / "envelope.json").exists()


@pytest.mark.slow
def test_the_report_shows_every_table(folders: tuple[Path, Path]) -> None:
    out, _ = folders
    assert CliRunner().invoke(app, ["report", "--out", str(out)], catch_exceptions=False).exit_code == 0
    tables = json.loads((out / "report.json").read_text())["tables"]
    assert set(tables) == {*TABLES, "forgetting_ink"}
    assert tables["words"] == json.loads((out / "words.json").read_text())
    page = (out / "report.html").read_text()
    for heading in (
        "Is the concept gone?", "However it is drawn", "Benign prompts", "Several concepts", "Ablation", "Out of distribution",
        "masks over the words", "Attacks: church, 4 steps", "Embeddings that guidance amplifies",
    ):  # fmt: skip
        assert heading in page
    assert page.count("data:image/png") >= 6


@pytest.mark.slow
def test_figures_are_written_of_every_table(folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    out, _ = folders
    for concept in ("ink", "weapons"):
        shutil.copy(out / "forgetting_church.json", out / f"forgetting_{concept}.json")
    for concept in ("church", "ink", "weapons"):
        shutil.copy(out / "attacks_church_4_steps.json", out / f"attacks_{concept}.json")
    for module in ("markdown", "readme", "robustness_figures", "summary_figures"):
        monkeypatch.setattr(f"benchmarks.{module}.RESULTS", out)
    page = figures()
    for heading in (
        "Is the concept gone", "However it is drawn", "fire on benign prompts", "neither model nor safety ever saw",
        "each other's way", "each mechanism for", "hide what they ask for",
        "which guidance amplifies",
    ):  # fmt: skip
        assert heading in page
    for line in ("gone, by names that training has not seen", "worst attack by text", "everyday prompts as users write them"):
        assert line in works()


@pytest.mark.slow
def test_what_is_searched_by_gradient_is_measured(folders: tuple[Path, Path], tmp_path: Path) -> None:
    command = ["gradient-attacks", "--quick", "--out", str(tmp_path), "--work", str(folders[1])]
    assert CliRunner().invoke(app, command, catch_exceptions=False).exit_code == 0
    assert json.loads((tmp_path / "gradient_attacks_church.json").read_text())["families"]


def test_a_plan_says_how_long_each_table_takes_and_draws_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.plan.step_seconds", lambda: 0.03)
    said = CliRunner().invoke(app, ["everything", "--plan", "--out", str(tmp_path)], catch_exceptions=False).output
    first, second = ([float(line.split()[-2]) for line in part.splitlines()[1:]] for part in said.split("\n30.0 ms"))
    assert second == pytest.approx([2 * minutes for minutes in first], abs=0.2)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["everything", "attacks"])
def test_an_unknown_task_is_named(command: str) -> None:
    said = CliRunner(env={"COLUMNS": "200"}).invoke(app, [command, "--task", "temple"])
    assert said.exit_code == 2
    for word in ("temple", "church", "weapons"):
        assert word in said.output


def test_recorded_pictures_that_are_not_there_are_named_before_anything_is_drawn(tmp_path: Path) -> None:
    said = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["everything", "--recorded", str(tmp_path / "nowhere")])
    assert said.exit_code == 2
    assert "nowhere" in said.output


@pytest.mark.parametrize("script", ["benchmarks/evaluate/__main__.py", "benchmarks/evaluate.py"])
def test_a_command_is_stated_as_it_is_given_again(monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    monkeypatch.setattr("sys.argv", [script, "envelope", "--quick"])
    assert environment()["command"] == "python -m benchmarks.evaluate envelope --quick"
