"""Prompts to token ids, with a count of what did not fit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from saferedir.engines.errors import BundleAlteredError, RequestError
from saferedir.engines.json_text import printable

LONGEST_PROMPT = 10_000
#: CLIP's and T5's.
ENDS_OF_TEXT = ("<|endoftext|>", "</s>")


@dataclass(frozen=True)
class Tokenised:
    """A prompt as the text encoder takes it."""

    #: [T] int32, start, words, end, padding.
    ids: npt.NDArray[np.int32]
    #: The token texts before padding, start and end included.
    tokens: tuple[str, ...]
    #: How many tokens at the end did not fit and were cut.
    cut: int


def check_prompt(prompt: object) -> str:
    """`prompt`, if it is text that can be tokenised.

    Raises:
        RequestError: it is not text, or longer than 10,000 characters.
    """
    if not isinstance(prompt, str):
        raise RequestError(f"prompt is {type(prompt).__name__}; expected text")
    if len(prompt) > LONGEST_PROMPT:
        raise RequestError(f"prompt has {len(prompt)} characters; expected at most {LONGEST_PROMPT}")
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise RequestError(f"prompt holds half of a surrogate pair at character {error.start}; expected text") from None
    return prompt


class PromptTokenizer:
    """CLIP's or T5's tokenizer from a bundle, without transformers."""

    def __init__(
        self, data: bytes, length: int, added_words: Mapping[str, Sequence[str]] | None = None, source: str = "tokenizer.json"
    ) -> None:
        """Of the bytes of a tokenizer file, `source` in errors."""
        #: Longest first, since one may begin another.
        self._added = sorted((added_words or {}).items(), key=lambda item: -len(item[0]))
        with _typed(f"{source} is not a tokenizer file"):
            self._tokenizer = Tokenizer.from_str(data.decode())
            padding = self._tokenizer.padding
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._length, self._source = length, source
        ends = [(text, found) for text in ENDS_OF_TEXT if (found := self._tokenizer.token_to_id(text)) is not None]
        if not ends:
            raise BundleAlteredError(f"{source} has no token {' or '.join(ENDS_OF_TEXT)}")
        self._end_text, self._end = ends[0]
        #: Stable Diffusion 1 pads with its end of text, 2 with another token.
        self._padding: int = padding["pad_id"] if padding else self._end

    def __call__(self, prompt: str) -> Tokenised:
        """Tokenise one prompt, which may be empty.

        Raises:
            RequestError: it is not text, or longer than 10,000 characters.
        """
        prompt = check_prompt(prompt)
        for word, tokens in self._added:
            prompt = prompt.replace(word, " ".join(tokens))
        with _typed(f"{self._source} cannot read a prompt"):
            encoding = self._tokenizer.encode(prompt)
            ids, tokens = list(encoding.ids), list(encoding.tokens)
            cut = max(0, len(ids) - self._length)
            if cut:
                ids = [*ids[: self._length - 1], self._end]
                tokens = [*tokens[: self._length - 1], self._end_text]
            padded = np.full(self._length, self._padding, np.int32)
            padded[: len(ids)] = ids
            return Tokenised(padded, tuple(tokens), cut)


@contextmanager
def _typed(problem: str) -> Iterator[None]:
    """What tokenizers raises as `BundleAlteredError`: plain exceptions, and panics of Rust, which are none of `Exception`."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise BundleAlteredError(f"{problem}: {printable(str(error))}; restore the bundle") from None
