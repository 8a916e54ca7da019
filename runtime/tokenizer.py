"""Prompts to token ids, with a count of what did not fit."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Encoding, Tokenizer

from saferedir.engines.errors import BundleAlteredError, RequestError
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

    def __init__(self, path: Path, length: int) -> None:
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises plain Exception
            raise BundleAlteredError(f"{path} is not a tokenizer file: {error}") from error
        padding = self._tokenizer.padding
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._boundaries = TokenBoundaries(self._tokenizer)
        self._length = length
        ends = [(text, found) for text in ENDS_OF_TEXT if (found := self._tokenizer.token_to_id(text)) is not None]
        if not ends:
            raise BundleAlteredError(f"{path} has no token {' or '.join(ENDS_OF_TEXT)}")
        self._end_text, self._end = ends[0]
        #: Stable Diffusion 1 pads with its end of text, 2 with another token.
        self._padding: int = padding["pad_id"] if padding else self._end

    def __call__(self, prompt: str) -> Tokenised:
        """Tokenise one prompt that `check_prompt` has seen; it may be empty, and longer by now, since plain letters may be."""
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
