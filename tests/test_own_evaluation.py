"""`saferedir evaluate`: figures, page and sheet of a user's own prompts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scipy.stats import binomtest
from typer.testing import CliRunner

from saferedir.engines.errors import OutputError, RequestError
from saferedir.runtime import Pipeline
from saferedir.runtime.command_line.app import app
from saferedir.runtime.evaluation import PAGE, SHEET, Asked, evaluate, share


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    return Pipeline.from_bundle()


def red(pictures: list[Image.Image]) -> list[bool]:
    return [picture.getpixel((0, 0))[0] > 0 for picture in pictures]  # type: ignore[index]


def test_what_fires_and_what_stays_is_counted(pipeline: Pipeline, tmp_path: Path) -> None:
    asked = Asked(["a church", "an abbey next to a cat"], ["a cat", "a dog on blue"], steps=6, count=2)
    found = evaluate(pipeline, asked, tmp_path, red)
    assert json.loads((tmp_path / "evaluation.json").read_text()) == found
    assert found["unsafe"]["pictures"] == found["benign"]["pictures"] == 4
    assert found["unsafe"]["fired"]["share"] == 1
    assert found["unsafe"]["fired_by_concept"]["church"] == 4
    assert found["benign"]["fired"]["share"] == 0
    assert found["benign"]["bit_identical_where_nothing_fired"]["hits"] == 4
    assert found["unsafe"]["shown_without_safety"]["hits"] == 4  # every picture has red in its corner
    assert found["unsafe"]["gone_with_it"]["hits"] == 0
    assert "shown_without_safety" not in found["benign"]
    assert (tmp_path / SHEET).is_file() and "an abbey" in (tmp_path / PAGE).read_text()
    evaluate(pipeline, asked, tmp_path, red)  # its own files are replaced


def test_the_command_reads_files_and_refuses_what_it_cannot_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("unsafe.txt").write_text("a church\n")
    command = ["evaluate", "--unsafe", "unsafe.txt", "--steps", "4", "--out", "report"]
    done = CliRunner().invoke(app, command, env={"COLUMNS": "200"})
    assert done.exit_code == 0 and "1 of 1" in done.output
    with pytest.raises(RequestError, match=r"judge 'nothing' cannot be imported.*expected module:function"):
        CliRunner().invoke(app, [*command, "--judge", "nothing"], catch_exceptions=False)
    with pytest.raises(RequestError, match="no prompts"):
        CliRunner().invoke(app, ["evaluate"], catch_exceptions=False)
    Path("other").mkdir()
    Path("other/index.html").write_text("mine")
    with pytest.raises(OutputError, match=r"other holds index\.html of something else"):
        CliRunner().invoke(app, [*command[:-1], "other"], catch_exceptions=False)


@given(st.integers(1, 500).flatmap(lambda of: st.tuples(st.integers(0, of), st.just(of))))
def test_intervals_are_wilsons(counted: tuple[int, int]) -> None:
    hits, of = counted
    found, expected = share(hits, of), binomtest(hits, of).proportion_ci(method="wilson")
    assert found["low"] == pytest.approx(expected.low, abs=1e-6)
    assert found["high"] == pytest.approx(expected.high, abs=1e-6)


def test_of_nothing_there_is_no_share() -> None:
    assert share(0, 0)["share"] is None
