"""The prompts of one call: each distinct one read and encoded once, however many pictures are drawn of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from saferedir.engines.plain_letters import in_plain_letters
from saferedir.runtime.request import ImageRequest
from saferedir.runtime.tokenizer import PromptTokenizer, Tokenised

Encode = Callable[[npt.NDArray[np.int32]], npt.NDArray[np.float32]]


class Prompts:
    """What the prompts of `requests` are read as, and their embeddings, batch by batch."""

    def __init__(
        self, requests: Sequence[ImageRequest], tokenizer: PromptTokenizer, encode: Encode, *, plain_letters: bool
    ) -> None:
        """`encode` maps token ids [P, T] to embeddings [P, T, D]; with `plain_letters` words that look plain are read so."""
        asked = {request.prompt for request in requests} - {None}
        self._read = {text: tokenizer(in_plain_letters(text) if plain_letters else text) for text in asked if text is not None}
        self._negative = {text: tokenizer(text) for text in {request.negative_prompt or "" for request in requests}}
        self._encode = encode
        #: Of the last batch, since the pictures of a prompt follow each other.
        self._embeds: dict[bytes, npt.NDArray[np.float32]] = {}

    def tokens(self, request: ImageRequest) -> Tokenised | None:
        """The prompt as it was read, or None where its embedding was given."""
        return None if request.prompt is None else self._read[request.prompt]

    def embeddings(self, batch: Sequence[ImageRequest]) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """Embeddings of prompts and of negative prompts, [B, T, D] each."""
        prompts = [self.tokens(request) for request in batch]
        negatives = [self._negative[request.negative_prompt or ""] for request in batch]
        wanted = {read.ids.tobytes(): read.ids for read in (*prompts, *negatives) if read is not None}
        known = {key: self._embeds[key] for key in wanted if key in self._embeds}
        missing = [key for key in wanted if key not in known]
        if missing:
            known |= dict(zip(missing, self._encode(np.stack([wanted[key] for key in missing])), strict=True))
        self._embeds = known
        return (
            np.stack([_or_given(known, read, one.prompt_embeds) for one, read in zip(batch, prompts, strict=True)]),
            np.stack([_or_given(known, read, one.negative_prompt_embeds) for one, read in zip(batch, negatives, strict=True)]),
        )


def _or_given(
    known: dict[bytes, npt.NDArray[np.float32]], read: Tokenised | None, given: npt.NDArray[np.float32] | None
) -> npt.NDArray[np.float32]:
    if given is not None:
        return given
    assert read is not None
    return known[read.ids.tobytes()]
