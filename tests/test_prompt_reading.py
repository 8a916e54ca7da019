"""Reading a prompt takes time in proportion to its length, and what is left unread changes no token."""

from __future__ import annotations

import random
import re
import unicodedata
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Encoding, Regex, Tokenizer, models, normalizers, pre_tokenizers

from saferedir.engines import plain_letters
from saferedir.engines.bundle import DEFAULT_BUNDLE, locate
from saferedir.runtime import tokenizer as tokenizer_module
from saferedir.runtime.token_boundaries import LAST, TokenBoundaries
from saferedir.runtime.tokenizer import LONGEST_PROMPT, PromptTokenizer

#: Letters whose kinds, cases, compositions and bytes meet in every way that the tokenizer knows.
LETTERS = "ab1. '<|>stvredlmEOT\u0301\u0316İΣσ\u1100\u1161\u11a8각日😀\U0001d160२Ⅷ①\u200b\ufe0f\u0130ﷺé\n"


@pytest.fixture(scope="module")
def tokenizer_file() -> Path:
    return locate(DEFAULT_BUNDLE) / "tokenizer.json"


@pytest.fixture(scope="module")
def plain(tokenizer_file: Path) -> Tokenizer:
    """The library's own, which reads everything."""
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


@pytest.fixture(scope="module")
def with_words(plain: Tokenizer) -> Tokenizer:
    """One that reads added words: a toy of one token, a scene of two."""
    tokenizer = Tokenizer.from_str(plain.to_str())
    spread = normalizers.Replace(Regex(r"(?<!\w)scene(?!\w)"), "scene_0 scene_1")
    assert tokenizer.normalizer is not None
    tokenizer.normalizer = normalizers.Sequence([tokenizer.normalizer, spread])
    tokenizer.add_tokens([AddedToken(word, single_word=True, normalized=True) for word in ("<toy>", "scene_0", "scene_1")])
    return tokenizer


@settings(max_examples=400, deadline=None)
@given(
    words=st.lists(st.sampled_from(["<toy>", "Scene", "scene", "scenes", " ", "!", "२", "x", "<", "TOY>", "e"]), max_size=20),
    least=st.integers(1, 30),
)
def test_added_words_are_never_cut(with_words: Tokenizer, words: list[str], least: int) -> None:
    assert len(TokenBoundaries(with_words).beginning("२" * 100, 50)) < 55
    text = "".join(words)
    beginning = TokenBoundaries(with_words).beginning(text, least)
    if beginning == text or len(beginning) >= least + least // 2:
        return  # no sure end
    encoding, whole = with_words.encode(beginning), with_words.encode(text)
    ids = [token for token, (_, end) in zip(encoding.ids[:-1], encoding.offsets, strict=False) if end < len(beginning)]
    assert whole.ids[: len(ids)] == ids


@settings(max_examples=400, deadline=None)
@given(text=st.text(st.sampled_from(LETTERS), max_size=60) | st.text(max_size=40), least=st.integers(1, 30))
@example(text="x'rex<|endoftext|>", least=3)
@example(text="e\u0301", least=2)
def test_tokens_before_a_sure_end_depend_on_nothing_after(plain: Tokenizer, text: str, least: int) -> None:
    beginning = TokenBoundaries(plain).beginning(text, least)
    encoding = plain.encode(beginning)
    if len(beginning) >= least + least // 2:
        return  # no sure end
    sure = len(beginning) - (beginning != text)
    ids = [token for token, (_, end) in zip(encoding.ids[:-1], encoding.offsets, strict=False) if end <= sure]
    assert text.startswith(beginning)
    assert len(encoding.ids) - 1 - len(ids) <= (LAST if beginning != text else 0)
    assert plain.encode(text).ids[: len(ids)] == ids


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.sampled_from("ab \u0301日\n"), max_size=60), least=st.integers(1, 30))
def test_a_tokenizer_of_pieces_has_its_sure_ends_at_spaces(text: str, least: int) -> None:
    """As T5's, which looks for the likeliest pieces of a whole word."""
    pieces = [("<unk>", 0.0), ("\u2581", -2.0), ("a", -1.0), ("b", -2.0), ("ab", -1.5), ("ba", -1.2), ("\u2581a", -1.1)]
    whole = Tokenizer(models.Unigram(pieces, 0))
    whole.pre_tokenizer = pre_tokenizers.Metaspace()
    beginning = TokenBoundaries(whole).beginning(text, least)
    if len(beginning) >= least + least // 2 or beginning == text:
        return  # no sure end
    assert beginning[-1] == " "
    ids = whole.encode(beginning[:-1]).ids
    assert whole.encode(text).ids[: len(ids)] == ids


def test_a_tokenizer_of_another_kind_is_given_everything() -> None:
    other = Tokenizer(models.BPE({"a": 0, "b": 1}, []))
    assert TokenBoundaries(other).beginning("a b " * 10, 4) == "a b " * 10


@pytest.mark.parametrize("words", ["a cat ", "२б", "\U0001d160\u11a8", "x", "  "])
def test_what_the_tokenizer_is_given_grows_with_what_it_reads_alone(tokenizer_file: Path, words: str) -> None:
    """Half as much again as is needed, or, of spaces, the whole at most twice."""

    class Counting:
        def __init__(self, tokenizer: Tokenizer) -> None:
            self.tokenizer, self.given = tokenizer, 0

        def encode(self, text: str) -> Encoding:
            self.given += len(text)
            return self.tokenizer.encode(text)

    reader = PromptTokenizer(tokenizer_file.read_bytes(), 77)
    counting = Counting(reader._tokenizer)
    reader._tokenizer = counting  # type: ignore[assignment]
    reader((words * LONGEST_PROMPT)[:LONGEST_PROMPT])
    assert counting.given <= (3 * LONGEST_PROMPT if words.isspace() else tokenizer_module.READ * 3 // 2)


def test_strange_letters_have_sure_ends(plain: Tokenizer) -> None:
    boundaries = TokenBoundaries(plain)
    for letters in ("२б", "😀", "日", "11", ". "):
        assert len(boundaries.beginning(letters * 100, 50)) < 55


@pytest.mark.parametrize("words", ["a cat ", "२б", "日本", "1.", " ", "\u0301\u0316", "x", "ab", "\u11a8\U0001d160"])
def test_a_long_prompt_has_the_tokens_that_it_has_when_all_of_it_is_read(
    tokenizer_file: Path, plain: Tokenizer, words: str
) -> None:
    prompt = (words * LONGEST_PROMPT)[: LONGEST_PROMPT - 2] + " z"
    read = PromptTokenizer(tokenizer_file.read_bytes(), 77)(prompt)
    ids = plain.encode(prompt).ids
    expected = ids if len(ids) <= 77 else [*ids[:76], ids[-1]]
    assert read.ids[: len(expected)].tolist() == expected
    assert bool(read.cut) == (len(ids) > 77)
    assert read.cut <= max(0, len(ids) - 77)


def test_of_a_short_prompt_every_token_that_is_cut_is_counted(tokenizer_file: Path, plain: Tokenizer) -> None:
    prompt = "cat " * (tokenizer_module.READ // 4)
    assert PromptTokenizer(tokenizer_file.read_bytes(), 77)(prompt).cut == len(plain.encode(prompt).ids) - 77


def test_the_pattern_of_a_word_repeats_one_class() -> None:
    """No repetition within or after another one: every letter is looked at once."""
    assert plain_letters._RUN.pattern == rf"[\w{plain_letters.INVISIBLE}]+"


def test_words_are_read_once_and_marks_are_put_in_no_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is normalised is one line a distinct letter, however long the prompt and its words are."""
    normalised: list[int] = []
    normalize = plain_letters.unicodedata.normalize

    def counted(form: str, text: str) -> str:
        normalised.append(len(text))
        return normalize(form, text)

    monkeypatch.setattr(plain_letters.unicodedata, "normalize", counted)
    picked = random.Random(0)
    for alphabet in ("\u0301\u0316", "\u200b.", "ﷺс ", "\u115fx\u200d"):
        prompt = "".join(picked.choice(alphabet) for _ in range(LONGEST_PROMPT))
        plain_letters.in_plain_letters(prompt)
    assert len(normalised) == 4
    assert max(normalised) <= 2 * len("ﷺс ")


@settings(max_examples=300, deadline=None)
@given(st.text(st.sampled_from("\u0441\u200b\u0301x. \u115fﷺ\u2487\u1100\u1161") | st.characters(), max_size=12))
def test_a_word_is_plain_where_nfkc_of_the_whole_of_it_is(prompt: str) -> None:
    def whole(found: re.Match[str]) -> str:
        word = found[0]
        seen = re.sub(f"[{plain_letters.INVISIBLE}]", "", word)
        plain = unicodedata.normalize("NFKC", seen.translate(plain_letters._PLAIN)).translate(plain_letters._PLAIN)
        return plain if plain.isascii() and re.search(r"\w", word) else word

    assert plain_letters.in_plain_letters(prompt) == re.sub(rf"[\w{plain_letters.INVISIBLE}]+", whole, prompt)
