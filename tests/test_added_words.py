"""Words that textual inversions add are whole words in any case, and the same tokens in the runtime and in diffusers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from benchmarks.small_pipeline import save_small_pipeline
from saferedir.engines.errors import RequestError
from saferedir.export.added_words import read_embedding, with_words
from saferedir.export.bundle_export import _write_tokenizer
from saferedir.runtime.command_line.making import _named_word
from saferedir.runtime.tokenizer import PromptTokenizer
from saferedir_torch.models import load_pipeline

WIDTH = 32


def a1111(path: Path, vectors: int, name: str = "told inside") -> Path:
    """A file as A1111 writes it, which is called by its own name."""
    tensor = torch.randn(vectors, WIDTH)
    torch.save({"string_to_token": {"*": 265}, "string_to_param": {"*": tensor}, "name": name, "step": 100}, path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model, and files of several kinds."""
    folder = tmp_path_factory.mktemp("words")
    torch.manual_seed(0)
    save_small_pipeline(folder / "model", width=WIDTH, heads=2)
    torch.save({"<toy>": torch.randn(WIDTH)}, folder / "learned_embeds.bin")
    save_file({"<scene>": torch.randn(2, WIDTH)}, folder / "learned_embeds.safetensors")
    save_file({"emb_params": torch.randn(3, WIDTH)}, folder / "EasyNeg.safetensors")
    a1111(folder / "Glimt.pt", 1)
    return folder


@pytest.fixture(scope="module")
def plain(folder: Path) -> Any:
    return load_pipeline(folder / "model")


FILES = ("learned_embeds.bin", "learned_embeds.safetensors", "EasyNeg.safetensors", "Glimt.pt")


@pytest.fixture(scope="module")
def added(folder: Path, plain: Any) -> tuple[Any, dict[str, tuple[str, ...]]]:
    return with_words(plain, [(folder / name, None) for name in FILES])


@pytest.fixture(scope="module")
def saved(folder: Path, added: tuple[Any, Any]) -> Any:
    """The same, written and opened by stock diffusers."""
    added[0].save_pretrained(folder / "saved")
    return StableDiffusionPipeline.from_pretrained(folder / "saved")


@pytest.fixture(scope="module")
def runtime(folder: Path, added: tuple[Any, Any]) -> PromptTokenizer:
    (folder / "bundle").mkdir()
    _write_tokenizer(added[0].tokenizer, folder / "bundle")
    return PromptTokenizer((folder / "bundle" / "tokenizer.json").read_bytes(), 77)


def ids_of_diffusers(pipeline: Any, prompt: str) -> list[int]:
    """As `encode_prompt` makes them."""
    prompt = pipeline.maybe_convert_prompt(prompt, pipeline.tokenizer)
    found: list[int] = pipeline.tokenizer(prompt, padding="max_length", max_length=77, truncation=True).input_ids
    return found


def test_a_word_is_the_one_in_diffusers_files_and_the_files_own_name_in_others(added: tuple[Any, Any]) -> None:
    assert added[1] == {
        "<toy>": ("<toy>",),
        "<scene>": ("<scene>_0", "<scene>_1"),
        "easyneg": ("easyneg_0", "easyneg_1", "easyneg_2"),
        "glimt": ("glimt",),
    }


def test_a_word_is_given_behind_its_file(tmp_path: Path) -> None:
    assert _named_word("style.pt") == (Path("style.pt"), None)
    assert _named_word("folder/style.pt:Glow") == (Path("folder/style.pt"), "Glow")
    (tmp_path / "a:b.pt").touch()
    assert _named_word(f"{tmp_path}/a:b.pt") == (tmp_path / "a:b.pt", None)
    for text in ("style.pt:", ":glow"):
        with pytest.raises(RequestError, match="expected FILE or FILE:WORD"):
            _named_word(text)


def test_a_word_can_be_given(folder: Path, plain: Any) -> None:
    _, words = with_words(plain, [(folder / "Glimt.pt", "Oil-Paint"), (folder / "learned_embeds.bin", "toy!")])
    assert list(words) == ["oil-paint", "toy!"]


@pytest.mark.parametrize(
    ("prompt", "tokens"),
    [
        ("a GLIMT cat", ["a</w>", "glimt", "cat</w>"]),
        ("EasyNeg, glimt.", ["easyneg_0", "easyneg_1", "easyneg_2", ",</w>", "glimt", ".</w>"]),
        ("(easyneg:1.2)", ["(</w>", "easyneg_0", "easyneg_1", "easyneg_2", ":</w>", "1</w>", ".</w>", "2</w>", ")</w>"]),
        ("a <Scene>", ["a</w>", "<scene>_0", "<scene>_1"]),
    ],
)
def test_a_word_in_a_prompt_is_its_tokens(prompt: str, tokens: list[str], runtime: PromptTokenizer, saved: Any) -> None:
    assert list(runtime(prompt).tokens)[1:-1] == tokens
    assert saved.tokenizer.convert_ids_to_tokens(ids_of_diffusers(saved, prompt))[1 : len(tokens) + 1] == tokens


@pytest.mark.parametrize("prompt", ["UnEasyNegotiable", "glimts", "deglimt", "easyneg2", "a<toy>b", "glimté"])
def test_a_word_inside_another_is_not_read(prompt: str, runtime: PromptTokenizer, plain: Any) -> None:
    assert runtime(prompt).ids.tolist() == ids_of_diffusers(plain, prompt)


PIECES = st.sampled_from(
    ["EasyNeg", "easyneg", "EASYNEG", "glimt", "Glimt", "<toy>", "<TOY>", "<scene>", "uneasynegotiable", "deglimt", "glimt_1",
     "easyneg_1", "<scene>_0", "a cat", " ", "  ", ",", "(", ":1.2)", "_", "-", "é", "\u0301", "1", "\n", "x", "'s", "."]
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(pieces=st.lists(PIECES, max_size=12))
def test_the_runtime_and_diffusers_read_the_same(pieces: list[str], runtime: PromptTokenizer, saved: Any) -> None:
    prompt = "".join(pieces)
    assert runtime(prompt).ids.tolist() == ids_of_diffusers(saved, prompt)


def test_added_words_leave_all_others_as_they_are(plain: Any, added: tuple[Any, Any]) -> None:
    ids = plain.tokenizer("a church beside a cat", padding="max_length", return_tensors="pt").input_ids
    assert added[0].tokenizer("a church beside a cat", padding="max_length", return_tensors="pt").input_ids.equal(ids)
    with torch.no_grad():
        before, after = (one.text_encoder(ids).last_hidden_state for one in (plain, added[0]))
    assert torch.equal(before, after)
    assert "<toy>" not in plain.tokenizer.get_vocab()


def test_a_word_has_the_vectors_of_its_file(folder: Path, added: tuple[Any, Any]) -> None:
    table = added[0].text_encoder.get_input_embeddings().weight
    for name in FILES:
        word, vectors = read_embedding(folder / name)
        ids = added[0].tokenizer.convert_tokens_to_ids(list(added[1][word]))
        assert torch.equal(table[ids], vectors)


def test_a_word_is_drawn_as_diffusers_draws_it(folder: Path, added: tuple[Any, Any]) -> None:
    theirs = load_pipeline(folder / "model")
    theirs.load_textual_inversion(folder / "learned_embeds.bin")
    theirs.load_textual_inversion(folder / "learned_embeds.safetensors")
    # diffusers knows the case of a word that it was given, and no other.
    for prompt in ("a <toy> beside a cat", "a <scene>"):
        ours, expected = (one.encode_prompt(prompt, "cpu", 1, False)[0] for one in (added[0], theirs))
        assert torch.allclose(ours, expected, atol=1e-6)


class Surprise:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("ran"),)


def test_a_file_that_would_run_code_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"string_to_param": {"*": Surprise()}}, "evil.pt")
    with pytest.raises(RequestError, match=r"evil\.pt is no readable textual inversion"):
        read_embedding(Path("evil.pt"))
    assert not Path("ran").exists()


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        ({"clip_g": torch.zeros(1, 8), "clip_l": torch.zeros(1, 8)}, "is a textual inversion of Stable Diffusion XL"),
        ({"a": torch.zeros(1), "b": torch.zeros(1)}, "holds 2 tensors, such as 'a'; expected the one"),
        ({}, "holds 0 tensors"),
        ({"word": torch.full((1, WIDTH), float("nan"))}, "word is no tensor of finite numbers"),
        ({"word": torch.zeros(1, 1).expand(10**6, 10**6)}, "word is no tensor of finite numbers"),
        ({"word": torch.zeros(1, WIDTH, device="meta")}, "word is no tensor of finite numbers"),
        ({"word": torch.zeros(1, WIDTH).to_sparse()}, "word is no tensor of finite numbers"),
        ({"word": torch.zeros(1, WIDTH).to(torch.float8_e4m3fn)}, "word is no tensor of finite numbers"),
        ({"word": torch.zeros(1, 2, WIDTH)}, r"word has shape \(1, 2, 32\)"),
        ({"word": torch.zeros(0, WIDTH)}, r"word has shape \(0, 32\)"),
        ({"tw\x1bo": torch.zeros(1, WIDTH)}, "cannot be typed as one word; name another by FILE:WORD"),
        ({"my word": torch.zeros(1, WIDTH)}, "'my word' cannot be typed as one word"),
        ({"word": 3}, "word is no tensor of finite numbers"),
    ],
)
def test_what_is_no_textual_inversion_is_named(raw: dict[str, Any], says: str, tmp_path: Path) -> None:
    torch.save(raw, tmp_path / "odd.pt")
    with pytest.raises(RequestError, match=says):
        read_embedding(tmp_path / "odd.pt")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["cat"], "the word 'cat' is there already; name another by FILE:WORD"),
        (["glimt", "GLIMT"], "'glimt' cannot be told from 'glimt'"),
        (["glimt", "glimt_1"], "'glimt_1' cannot be told from 'glimt'"),
        (["oil-glimt", "glimt"], "'glimt' cannot be told from 'oil-glimt'"),
    ],
)
def test_words_that_cannot_be_told_apart_are_refused(words: list[str], says: str, folder: Path, plain: Any) -> None:
    with pytest.raises(RequestError, match=says):
        with_words(plain, [(folder / "Glimt.pt", word) for word in words])


def test_a_word_that_no_prompt_holds_is_named(tmp_path: Path, plain: Any) -> None:
    save_file({"<long>": torch.randn(76, WIDTH)}, tmp_path / "long.safetensors")
    with pytest.raises(RequestError, match="has 76 vectors, which no prompt holds; expected at most 75"):
        with_words(plain, [(tmp_path / "long.safetensors", None)])


def test_a_word_of_another_width_is_named(tmp_path: Path, plain: Any) -> None:
    save_file({"<wide>": torch.randn(64)}, tmp_path / "wide.safetensors")
    with pytest.raises(RequestError, match=r"wide\.safetensors has vectors of width 64; the text encoder's words have 32"):
        with_words(plain, [(tmp_path / "wide.safetensors", None)])
