"""Prompts to token ids, with a count of what did not fit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from tokenizers import Encoding, Tokenizer

from saferedir.engines.errors import BundleAlteredError, RequestError
from saferedir.engines.printable import printable
from saferedir.runtime.token_boundaries import LAST, TokenBoundaries

LONGEST_PROMPT = 10_000
#: Characters of a longer prompt that are tokenised where they fill the text encoder, whatever follows.
READ = 1_000
#: CLIP's and T5's.
ENDS_OF_TEXT = ("<|endoftext|>", "</s>")


@dataclass(frozen=True)
class Tokenised:
    """A prompt as the text encoder takes it."""

    #: [T] int32, start, words, end, padding.
    ids: npt.NDArray[np.int32]
    #: The token texts before padding, start and end included.
    tokens: tuple[str, ...]
    #: How many tokens at the end did not fit and were cut; of a prompt of more than `READ` characters, at least how many.
    cut: int


def check_prompt(prompt: object, field: str = "prompt") -> str:
    """`prompt`, if it is text that can be tokenised.

    Raises:
        RequestError: it is not text, or longer than 10,000 characters; the message names `field`.
    """
    if not isinstance(prompt, str):
        raise RequestError(f"{field} is {type(prompt).__name__}; expected text")
    if len(prompt) > LONGEST_PROMPT:
        raise RequestError(f"{field} has {len(prompt)} characters; expected at most {LONGEST_PROMPT}")
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise RequestError(f"{field} holds half of a surrogate pair at character {error.start}; expected text") from None
    return prompt


class PromptTokenizer:
    """CLIP's or T5's tokenizer from a bundle, without transformers. Its file reads added words as their tokens."""

    def __init__(self, data: bytes, length: int, source: str = "tokenizer.json") -> None:
        """Of the bytes of a tokenizer file, `source` in errors."""
        with _typed(f"{source} is not a tokenizer file"):
            self._tokenizer = Tokenizer.from_str(data.decode())
            padding = self._tokenizer.padding
            self._boundaries = TokenBoundaries(self._tokenizer)
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
        """Tokenise one prompt that `check_prompt` has seen; it may be empty, and longer by now, since plain letters may be."""
        with _typed(f"{self._source} cannot read a prompt"):
            encoding = self._encode(prompt)
            ids, tokens = list(encoding.ids), list(encoding.tokens)
            cut = max(0, len(ids) - self._length)
            if cut:
                ids = [*ids[: self._length - 1], self._end]
                tokens = [*tokens[: self._length - 1], self._end_text]
            padded = np.full(self._length, self._padding, np.int32)
            padded[: len(ids)] = ids
            return Tokenised(padded, tuple(tokens), cut)

    def _encode(self, prompt: str) -> Encoding:
        """The tokens of as much of `prompt` as fills the text encoder, of all of it where it is short."""
        least = READ
        while True:
            beginning = self._boundaries.beginning(prompt, least)
            encoding = self._tokenizer.encode(beginning)
            if len(beginning) == len(prompt) or len(encoding.ids) > self._length + LAST:
                return encoding
            least *= 2  # of spaces, most likely


@contextmanager
def _typed(problem: str) -> Iterator[None]:
    """What tokenizers raises as `BundleAlteredError`: plain exceptions, and panics of Rust, which are none of `Exception`."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise BundleAlteredError(f"{problem}: {printable(str(error))}; restore the bundle") from None
