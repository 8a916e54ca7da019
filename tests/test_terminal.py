"""The command line at its edges: what it writes to, what it prints, and what it is asked for. In this process."""

from __future__ import annotations

import io
import json
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from saferedir.engines import DEFAULT_BUNDLE
from saferedir.engines.manifest import MANIFEST_FILE
from saferedir.engines.printable import printable
from saferedir.runtime import Pipeline
from saferedir.runtime.command_line import entry
from saferedir.runtime.command_line.console import print_json
from saferedir.runtime.command_line.entry import _OneLine, main
from tests.conftest import Edit

ESCAPES = "\x1b[31mred\x1b[0m\x07\x9b2J\u202egnp.exe\r[bold]:bomb:"


@pytest.fixture(autouse=True)
def opened(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands draw with engines that are open already, under the policy that they ask for."""

    def from_bundle(path: str, *, policy: Any = None, **_: Any) -> Pipeline:
        return Pipeline(pipeline.bundle, pipeline.backend, policy) if path == DEFAULT_BUNDLE else genuine(path, policy=policy)

    genuine = Pipeline.from_bundle
    monkeypatch.setattr(Pipeline, "from_bundle", from_bundle)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Runs a command and returns its exit code."""

    def command(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["saferedir", *arguments])
        with pytest.raises(SystemExit) as left:
            main()
        return int(left.value.code or 0)

    return command


Run = Callable[..., int]


@pytest.mark.parametrize(
    "command",
    [["inspect"], ["inspect", "--json"], ["doctor"], ["doctor", "--json"], ["generate", "a cat", "--steps", "4", "--out", "-"]],
)
def test_a_full_output_is_one_line_and_its_exit_code(
    run: Run, command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with Path("/dev/full").open("w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert run(*command) == 6
    assert capsys.readouterr().err.strip() == "error: standard output cannot be written (No space left on device)"


def test_a_reader_that_has_seen_enough_ends_a_command_quietly(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    read, write = os.pipe()
    os.close(read)
    monkeypatch.setattr(sys, "stdout", os.fdopen(write, "w"))
    assert run("inspect", "--json") == 1
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("command", [["inspect"], ["inspect", "--json"], ["doctor"]])
def test_an_output_in_ascii_has_what_it_lacks_as_escapes(run: Run, command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    assert run(*command) == 0
    sys.stdout.flush()
    text = written.getvalue().decode("ascii")
    if command == ["inspect"]:
        assert r"church \u2192 house" in text
    if "--json" in command:
        assert json.loads(text)["name"] == "emoji-diffusion"


def test_names_reach_no_terminal_as_commands(
    run: Run, bundle_copy: Path, edit_manifest: Edit, capsys: pytest.CaptureFixture[str]
) -> None:
    def rename(raw: dict[str, Any]) -> None:
        raw["name"] = ESCAPES
        raw["made_with"]["torch"] = ESCAPES
        raw["safety"]["concepts"][0]["name"] = ESCAPES

    edit_manifest(bundle_copy, rename)
    code = run("inspect", str(bundle_copy))
    shown = capsys.readouterr()
    assert not [letter for letter in shown.out + shown.err if letter in "\x1b\x07\x9b\u202e\r"]
    if code == 0:  # a manifest with such names may be refused
        assert r"\x1b[31mred\x1b[0m\x07\x9b2J\u202egnp.exe\r[bold]:bomb:" in shown.out
        assert run("inspect", str(bundle_copy), "--json") == 0
        assert json.loads(capsys.readouterr().out)["name"] == ESCAPES


def test_errors_and_warnings_are_one_line_without_commands(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("inspect", "nowhere\n\x1b[2Jerror: none") == 3
    assert "\x1b" not in (said := capsys.readouterr().err)
    assert said.count("\n") == 1
    assert r"nowhere\n\x1b[2Jerror: none" in said
    record = logging.LogRecord("saferedir", logging.WARNING, "", 0, "concept %s", (ESCAPES,), None)
    assert "\x1b" not in _OneLine("%(levelname)s %(message)s").format(record)


@settings(max_examples=300)
@given(st.text())
def test_what_is_printed_is_seen(text: str) -> None:
    shown = printable(text)
    assert shown.isprintable()
    if text.isascii() and text.isprintable():
        assert shown == text


def test_two_runs_into_one_folder_keep_all_pictures(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        assert run("generate", "a cat", "a dog", "--steps", "4", "--seed", "4294967295", "--out", str(tmp_path)) == 0
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["0000-seed4294967295.png", "0001-seed0.png", "0002-seed4294967295.png", "0003-seed0.png"]
    assert (tmp_path / names[0]).read_bytes() == (tmp_path / names[2]).read_bytes()
    assert "0003-seed0.png  nothing fired" in capsys.readouterr().out


def test_a_link_to_a_folder_is_written_through(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "meant")
    assert run("generate", "a cat", "--steps", "4", "--out", str(tmp_path / "link")) == 0
    assert (tmp_path / "link").is_symlink()
    assert [path.name for path in (tmp_path / "meant").iterdir()] == ["0000-seed0.png"]
    monkeypatch.chdir(tmp_path / "meant")
    assert run("generate", "a cat", "--steps", "4", "--out", ".") == 0
    assert len(list((tmp_path / "meant").iterdir())) == 2


def test_a_random_seed_is_said_and_draws_the_same_again(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seeds = []
    for _ in range(2):
        assert run("generate", "a cat", "--steps", "4", "--seed", "-1", "--out", str(tmp_path), "--json") == 0
        (record,) = json.loads(capsys.readouterr().out)
        seeds.append(record["seed"])
    assert seeds[0] != seeds[1]
    assert run("generate", "a cat", "--steps", "4", "--seed", str(seeds[1]), "--out", str(tmp_path), "--json") == 0
    (again,) = json.loads(capsys.readouterr().out)
    assert Path(again["file"]).read_bytes() == Path(record["file"]).read_bytes()


def test_json_states_what_was_looked_for(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--concept", "ink", "--steps", "4", "--guidance", "1", "--negative", "a dog", "--out", str(tmp_path), "--json"]
    assert run("generate", "a cat \N{CYRILLIC SMALL LETTER ES}", *arguments) == 0
    (record,) = json.loads(capsys.readouterr().out)
    assert list(record["looked_for"]) == ["ink"]
    assert record["negative_prompt"] == "ignored"
    assert record["prompt"] == "a cat \N{CYRILLIC SMALL LETTER ES}"


def test_a_long_prompt_that_is_cut_is_said(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "prompts.txt").write_text(f"{'cat ' * 100}\n{'cat ' * 1000}\n")
    assert run("generate", "--file", str(tmp_path / "prompts.txt"), "--steps", "4", "--out", str(tmp_path / "out")) == 0
    first, second = capsys.readouterr().err.strip().splitlines()
    assert first == f"warning: {100 + 2 - 77} tokens of prompt 1 did not fit and were cut"
    assert second.startswith("warning: at least ")


def test_a_demonstration_goes_where_nothing_else_is(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("saferedir.runtime.demo.DEMO_PROMPTS", (("one", "a cat"),))
    assert run("demo", "--out", str(tmp_path)) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["contact-sheet.png", "index.html"]
    assert Image.open(tmp_path / "contact-sheet.png").height > 64
    (tmp_path / "index.html").write_text("mine")
    assert run("demo", "--out", str(tmp_path)) == 6
    assert (tmp_path / "index.html").read_text() == "mine"


def test_an_export_onto_its_model_leaves_it(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model_index.json").write_text("{}")
    assert run("export", str(tmp_path / "model"), "--safety", str(tmp_path), "--out", str(tmp_path / "model")) == 6
    assert "is " in capsys.readouterr().err
    assert (tmp_path / "model" / "model_index.json").read_text() == "{}"


def test_an_export_onto_another_programs_bundle_json_leaves_it(tmp_path: Path, run: Run) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / MANIFEST_FILE).write_text('{"name": "of another program"}')
    (tmp_path / "model").mkdir()
    assert run("export", str(tmp_path / "model"), "--safety", str(tmp_path / "model"), "--out", str(tmp_path / "out")) == 6
    assert (tmp_path / "out" / MANIFEST_FILE).read_text() == '{"name": "of another program"}'


def test_the_entry_point_needs_no_rich_to_say_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "saferedir.runtime.command_line.app", None)
    with pytest.raises(SystemExit) as left:
        entry.main()
    assert left.value.code == 4
    assert "saferedir[cli]" in capsys.readouterr().err


def test_plans_of_a_user_without_a_home_are_refused(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unknown(*_: object, **__: object) -> Path:
        raise RuntimeError("could not determine the home directory")

    monkeypatch.setattr("saferedir.engines.plan_cache.user_cache_path", unknown)
    assert run("build-plans") == 4
    assert "error: this user has no home folder to keep plans in" in capsys.readouterr().err


def test_a_reference_that_is_not_compared_with_is_refused(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("verify", "--against", str(tmp_path), "--against-backend", "ort-cpu") == 2
    assert "--against and --safety name the reference in PyTorch" in capsys.readouterr().err


def test_json_is_valid_whatever_it_states(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"psnr": float("inf"), "rows": [{"worst": float("nan")}], "pair": (1, 2.5), "name": ESCAPES})
    assert json.loads(capsys.readouterr().out, parse_constant=pytest.fail) == {
        "psnr": None, "rows": [{"worst": None}], "pair": [1, 2.5], "name": ESCAPES,
    }  # fmt: skip
