"""Where a long prompt can be cut without a change in the tokens before, so that what no model will read costs nothing.

Byte-level BPE only ever joins two neighbouring bytes that stand beside each other in some token of its vocabulary. Where none
has the last byte of one letter before the first byte of the next, a token ends whatever else the prompt holds, and the tokens
before depend on nothing after. So it is at a space.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterator
from itertools import chain, pairwise
from typing import Any

from tokenizers import Tokenizer, models

#: What CLIP's pattern takes as one piece although its letters are of several kinds.
CONTRACTIONS = ("'s", "'t", "'re", "'ve", "'m", "'ll", "'d")
#: CLIP's normalisation, under which every letter is read by itself, but for what is composed. Words that were added as several
#: tokens are replaced by these thereafter.
CLIP_NORMALIZERS = ["NFC", "Replace", "Lowercase"]
END_OF_WORD = "</w>"
#: A letter has four bytes at most, and NFC writes none by more than three.
LAST = 12


class TokenBoundaries:
    """The sure ends of tokens in prompts for one tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        pieces, normalizers = _types(tokenizer.pre_tokenizer), _types(tokenizer.normalizer)
        by_letters = normalizers[:3] == CLIP_NORMALIZERS and set(normalizers[3:]) <= {"Replace"}
        #: Whether letters can be told apart by their bytes.
        self._has_pairs = isinstance(tokenizer.model, models.BPE) and "ByteLevel" in pieces and by_letters
        added = [token.content for token in tokenizer.get_added_tokens_decoder().values()]
        self._begin_added = {text[:1].lower() for text in added}
        self._splits_at_spaces = (self._has_pairs or "Metaspace" in pieces) and not any(" " in text for text in added)
        #: Two neighbouring bytes of any token, in the byte-level alphabet.
        self._pairs: frozenset[str] = frozenset()
        if self._has_pairs:
            texts = [*(token.removesuffix(END_OF_WORD) for token in tokenizer.get_vocab()), *added, *CONTRACTIONS]
            self._pairs = frozenset(map("".join, chain.from_iterable(pairwise(text) for text in texts)))

    def beginning(self, prompt: str, least: int) -> str:
        """`prompt` up to the first letter behind a sure end of a token after `least` characters; all of it where the tokenizer
        is of a kind whose ends are not known.

        That letter stays, so that the one before it ends a word where it does in the whole prompt. Its own tokens, `LAST` at
        most, may be others. Where half as many characters more hold no sure end, as one letter repeated may, it ends there: for
        a token before `least` to be another by that, a chain of merges of different ranks would have to lie on all of them.
        """
        if not self._splits_at_spaces:
            return prompt
        most = least + least // 2
        for index in range(least, min(most, len(prompt))):
            if self._is_sure(prompt[index - 1], prompt[index]):
                return prompt[: index + 1]
        return prompt[:most]

    def _is_sure(self, before: str, after: str) -> bool:
        if after == " ":
            return self._splits_at_spaces
        if not self._has_pairs or after.lower() in self._begin_added or not (_stands_alone(before) and _stands_alone(after)):
            return False
        first, second = (unicodedata.normalize("NFC", letter).lower().encode() for letter in (before, after))
        return _ALPHABET[first[-1]] + _ALPHABET[second[0]] not in self._pairs


def _stands_alone(letter: str) -> bool:
    """Whether NFC composes the letter with no other: it is known, no mark, and no part of a Korean syllable."""
    return unicodedata.category(letter)[0] in "LNPSZ" and not "\u1100" <= letter <= "\u11ff"


def _types(part: Any) -> list[str]:
    """The types of a part of a tokenizer, in turn, of each of its members where it is a sequence."""
    return [] if part is None else list(_each_type(json.loads(part.__getstate__())))


def _each_type(stated: dict[str, Any]) -> Iterator[str]:
    if stated["type"] != "Sequence":
        yield stated["type"]
    for member in stated.get("pretokenizers", stated.get("normalizers", ())):
        yield from _each_type(member)


#: The letter that stands for a byte in byte-level vocabularies: itself where it can be seen, the next free one otherwise.
_SEEN = [*range(33, 127), *range(161, 173), *range(174, 256)]
_UNSEEN = [byte for byte in range(256) if byte not in _SEEN]
_ALPHABET = {byte: chr(byte) for byte in _SEEN} | {byte: chr(256 + place) for place, byte in enumerate(_UNSEEN)}
