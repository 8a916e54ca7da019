"""A user's file of prompt pairs: what is accepted, what is repaired, and what is refused with which words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from saferedir.engines.errors import RequestError
from saferedir_torch.models import load_pipeline
from saferedir_torch.pairs_file import FilePrompts, Rewrite
from saferedir_torch.trajectories import tokenize

PAIRS = [{"unsafe": "a castle", "safe": "a house"}, {"unsafe": "a castle at night", "safe": "a house at night"}]


def write(path: Path, content: Any) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_both_published_forms_are_read(tmp_path: Path) -> None:
    content = {
        "source": "a remark",
        "style": [{"group": "x", "unsafe": "a dog in oil style", "safe": "a dog"}],
        "castle": {"unsafe": ["Castle on a hill", "an old castle"], "benign": [{"group": "x", "prompt": "a chair"}]},
        "benign": ["a table"],
    }
    source = FilePrompts(write(tmp_path / "pairs.json", content), rewrites={"castle": Rewrite("castle", "house")})
    assert source.pairs["castle"] == [("Castle on a hill", "house on a hill"), ("an old castle", "an old house")]
    assert source.pairs["style"] == [("a dog in oil style", "a dog")]
    assert source.benign_prompts == ["a table", "a chair"]
    assert source.replacements == {"style": "safe rewrite", "castle": "house"}
    drawn = [source.pair("castle", np.random.default_rng(seed)) for seed in range(60)]
    joint = [pair for pair in drawn if len(pair.asked) == 2]
    assert 0 < len(joint) < 40
    assert {pair.replaced for pair in joint} == {("castle",), ("castle", "style")}
    for pair in joint:
        assert ("oil" in pair.safe) == ("style" not in pair.replaced)


def test_a_pair_that_occurs_twice_is_kept_once_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = FilePrompts(write(tmp_path / "pairs.json", {"castle": [*PAIRS, PAIRS[0]]}))
    assert len(source.pairs["castle"]) == 2
    assert "1 pairs occur more than once" in caplog.text


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "cannot be read as JSON"),
        ([1], "one key a concept"),
        ({"castle": []}, "'castle' is empty"),
        ({"castle": [{"unsafe": "a castle"}]}, "pair 0 is"),
        ({"castle": [{"unsafe": "a castle", "safe": " "}]}, "expected a prompt"),
        ({"castle": [{"unsafe": "a house", "safe": "a house"}]}, "its own rewrite"),
        ({"castle": {"unsafe": ["a castle"]}}, "--rewrite"),
        ({"castle": {"unsafe": ["a castle", "two castles"], "safe": ["a house"]}}, "2 unsafe and 1 safe"),
        ({"castle": {"safe": ["a house"]}}, "a list `unsafe`"),
        ({"castle": [*PAIRS, {"unsafe": "a house", "safe": "a hut"}]}, "both unsafe and safe"),
        ({"castle": PAIRS, "benign": ["a castle"]}, "both unsafe and safe"),
        ({"castle": PAIRS, "benign": "a chair"}, "no list"),
        ({"tower": PAIRS}, "no concept castle"),
    ],
)
def test_files_that_cannot_be_trained_on(tmp_path: Path, content: Any, said: str) -> None:
    path = write(tmp_path / "pairs.json", content)
    with pytest.raises(RequestError, match=said) as caught:
        FilePrompts(path, ["castle"])
    assert str(path) in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"nowhere\.json"):
        FilePrompts(tmp_path / "nowhere.json")


def test_pairs_that_differ_only_where_they_are_cut_off(tmp_path: Path) -> None:
    long = "a cat " * 60
    pairs = [*PAIRS, {"unsafe": f"{long} castle", "safe": f"{long} house"}]
    source = FilePrompts(write(tmp_path / "pairs.json", {"castle": pairs}))
    tokenizer = load_pipeline().tokenizer

    def encode(prompts: list[str]) -> torch.Tensor:
        return tokenize(tokenizer, prompts)

    with pytest.raises(RequestError, match=r"pair 2.*same 77 tokens"):
        source.check_tokens(encode)
    FilePrompts(write(tmp_path / "short.json", {"castle": PAIRS})).check_tokens(encode)


def test_styles_keep_their_subject_and_words_of_the_file_are_no_everyday_ones(tmp_path: Path) -> None:
    path = tmp_path / "pairs.json"
    pairs = {"castle": [{"unsafe": "A castle, red", "safe": "a house"}], "noir": [{"unsafe": "a cat, noir", "safe": "a cat"}]}
    path.write_text(json.dumps(pairs | {"benign": ["a soft light"]}))
    source = FilePrompts(path, styles=["noir"])
    assert source.keeps_subject == {"noir"}
    assert {"castle", "noir", "house", "red"} <= source.telling
    with pytest.raises(RequestError, match="cubism is no concept here; expected some of castle, noir"):
        FilePrompts(path, styles=["cubism"])
    with pytest.raises(RequestError, match="noir is no concept here; expected some of castle"):
        FilePrompts(path, ["castle"], styles=["noir"])
