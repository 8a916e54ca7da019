"""The evaluation's quick form: every table is drawn, stored and shown, with a few pictures each."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from benchmarks.evaluate import app

TABLES = [
    ["forgetting", "--task", "church"],
    ["forgetting", "--task", "ink"],
    ["benign"],
    ["unfamiliar"],
    ["interference"],
    ["strength"],
    ["choose-strength"],
    ["cooldown"],
    ["added"],
    ["attacks"],
    ["gradient-attacks"],
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return tmp_path_factory.mktemp("results"), tmp_path_factory.mktemp("pictures")


@pytest.mark.parametrize("table", TABLES, ids=" ".join)
def test_a_table_is_measured_and_stored(folders: tuple[Path, Path], table: list[str]) -> None:
    out, work = folders
    options = ["--quick", "--out", str(out), "--work", str(work)]
    before = set(out.glob("*.json"))
    result = CliRunner().invoke(app, [*table, *options], catch_exceptions=False)
    assert result.exit_code == 0
    (written,) = set(out.glob("*.json")) - before
    stored = json.loads(written.read_text())
    assert stored["environment"]["packages"]
    assert len(stored) > 1


def test_an_interrupted_table_draws_nothing_twice(folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    out, work = folders
    (out / "benign.json").unlink()

    def refuse(*_: object) -> None:
        raise AssertionError("drawn again")

    monkeypatch.setattr("benchmarks.drawing._collect", refuse)
    CliRunner().invoke(app, ["benign", "--quick", "--out", str(out), "--work", str(work)], catch_exceptions=False)
    assert (out / "benign.json").exists()


def test_the_report_shows_every_table(folders: tuple[Path, Path]) -> None:
    out, _ = folders
    assert CliRunner().invoke(app, ["words", "--out", str(out)], catch_exceptions=False).exit_code == 0
    assert CliRunner().invoke(app, ["report", "--out", str(out)], catch_exceptions=False).exit_code == 0
    page = (out / "report.html").read_text()
    for heading in (
        "Is the concept gone?", "Benign prompts", "Several concepts", "How far to move", "Cooldown", "Out of distribution",
        "masks over the words", "A concept added: teddy", "Attacks: church", "Attacks by gradient: church",
    ):  # fmt: skip
        assert heading in page
    assert page.count("data:image/png") >= 8
