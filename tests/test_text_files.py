"""Files of prompts and pairs are read as editors save them; what is no text is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from saferedir.engines.errors import OutputError, RequestError, TrainingError
from saferedir.engines.text_files import LARGEST, read_prompts, read_text
from saferedir.runtime.command_line.app import app
from saferedir_torch.command_line.attack import read_targets
from saferedir_torch.command_line.benign_prompts import benign_prompts
from saferedir_torch.pairs_file import FilePrompts
from saferedir_torch.training_place import MARK, training_place
from saferedir_torch.training_run import _truncate_log

PAIRS = {"castle": [{"unsafe": "a castle \u2028 é", "safe": "a house \u2028 é"}]}
TARGETS = [{"prompt": "a castle é", "words": "a castle"}]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
def test_every_file_of_a_user_is_read_with_and_without_a_byte_order_mark(tmp_path: Path, encoding: str) -> None:
    def write(text: str) -> Path:
        marked = "\ufeff" + text if encoding.startswith("utf-16-") else text
        (tmp_path / "file").write_bytes(marked.encode(encoding))
        return tmp_path / "file"

    assert read_prompts(write("a cat é\r\n\r\n  a dog\u2028\x0b\x0c\x1c\x85 \n")) == ["a cat é", "a dog\u2028\x0b\x0c\x1c\x85"]
    texts, _, said = benign_prompts(write("a cat\u2028é\na dog"), 3, 0, ())
    assert texts == ["a cat\u2028é", "a dog", "a cat\u2028é"]
    assert said == "2 prompts of file"
    pairs = FilePrompts(write(json.dumps(PAIRS, ensure_ascii=False))).pairs
    assert pairs == {"castle": [("a castle \u2028 é", "a house \u2028 é")]}
    (target,) = read_targets(write(json.dumps(TARGETS, ensure_ascii=False)))
    assert target.prompt == "a castle é"


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.text(st.characters(exclude_characters="\n\r\0", codec="utf-8")), max_size=5), st.sampled_from(["\n", "\r\n"])
)
def test_a_line_ends_at_a_line_end_alone(tmp_path_factory: pytest.TempPathFactory, lines: list[str], end: str) -> None:
    path = tmp_path_factory.getbasetemp() / "lines.txt"
    path.write_bytes(end.join(["x", *lines]).encode())
    assert read_prompts(path) == ["x", *(line.strip(" \t") for line in lines if line.strip())]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"a cat\na\0dog\n", "holds a NUL in line 2; save it as text in UTF-8"),
        ("a cat".encode("utf-16-le"), "holds a NUL in line 1"),
        ("a cat".encode("utf-32"), "holds a NUL"),
        (b"a caf\xe9\n", r"is no text in utf-8 \(byte 5\)"),
        (b"\xff\xfea", "is no text in utf-16"),
        (b"\n \r\n", "holds no prompt"),
        (b"", "holds no prompt"),
    ],
)
@pytest.mark.parametrize("reader", [read_prompts, lambda path: benign_prompts(path, 1, 0, ())])
def test_what_is_no_text_is_refused_by_name(tmp_path: Path, data: bytes, message: str, reader: Callable[[Path], Any]) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes(data)
    with pytest.raises(RequestError, match=message) as caught:
        reader(path)
    assert str(caught.value).startswith(str(path))


def test_what_has_no_end_is_read_within_bounds(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="/dev/zero is larger than 16 MB"):
        read_text(Path("/dev/zero"))
    with (tmp_path / "large").open("wb") as file:
        file.truncate(LARGEST + 1)
    with pytest.raises(RequestError, match="is larger than 16 MB"):
        FilePrompts(tmp_path / "large")


@pytest.mark.parametrize("path", ["nowhere", "."])
def test_what_cannot_be_read_is_named(tmp_path: Path, path: str) -> None:
    with pytest.raises(RequestError, match=r"cannot be read \("):
        read_text(tmp_path / path)


def test_json_of_any_depth_is_a_typed_error(tmp_path: Path) -> None:
    (tmp_path / "deep.json").write_text("[" * 100_000)
    with pytest.raises(RequestError, match="cannot be read as JSON"):
        FilePrompts(tmp_path / "deep.json")


def test_a_training_keeps_to_a_folder_of_its_own(tmp_path: Path) -> None:
    theirs = tmp_path / "data"
    theirs.mkdir()
    (theirs / "safety.csv").write_text("name,age\n")
    with pytest.raises(OutputError, match=r"holds safety\.csv of something else"):
        training_place(theirs, ())
    assert [path.name for path in theirs.iterdir()] == ["safety.csv"]
    (tmp_path / "pairs").mkdir()
    (tmp_path / "pairs" / "pairs.json").write_text("{}")
    assert training_place(tmp_path / "pairs", ()) == tmp_path / "pairs"
    (tmp_path / "pairs" / "safety").mkdir()
    assert training_place(tmp_path / "pairs", ()) == tmp_path / "pairs"  # goes on
    assert (tmp_path / "pairs" / MARK).exists()


@pytest.mark.parametrize("out", ["model", "model/inside", "first"])
def test_a_training_does_not_write_over_what_it_reads(tmp_path: Path, out: str) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "first" / "safety").mkdir(parents=True)
    with pytest.raises(OutputError, match="which is read"):
        training_place(tmp_path / out, (tmp_path / "model", None, tmp_path / "first" / "safety"))


@pytest.mark.parametrize(
    ("options", "said"),
    [(["--rewrite", "a:b=c"], "give --pairs as well"), (["--pairs", "p", "--split", "s"], "--pairs replaces")],
)
def test_an_option_of_training_that_nothing_uses_is_refused(tmp_path: Path, options: list[str], said: str) -> None:
    result = CliRunner().invoke(app, ["train", "--model", "model", "--out", str(tmp_path / "out"), *options])
    assert result.exit_code == 2
    assert said in " ".join(result.output.replace("│", " ").split())
    assert not (tmp_path / "out").exists()


def test_a_table_that_is_no_log_of_a_training_is_left(tmp_path: Path) -> None:
    (tmp_path / "vae.csv").write_text("name,age\nx,3\n")
    with pytest.raises(TrainingError, match=r"vae\.csv is no log of a training"):
        _truncate_log(tmp_path / "vae.csv", 0)
    assert (tmp_path / "vae.csv").read_text() == "name,age\nx,3\n"
    (tmp_path / "vae.csv").write_text("step,loss\n1,3\n9,2\n")
    _truncate_log(tmp_path / "vae.csv", 4)
    assert (tmp_path / "vae.csv").read_text() == "step,loss\n1,3\n"
