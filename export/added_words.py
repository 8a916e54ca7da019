"""Words that textual inversions add: vectors in the text encoder, and a tokenizer that reads the words as their tokens.

The tokenizer does all of it, by its own file: whole words alone, without regard to case, a word of several vectors as so many
tokens. So the runtime and diffusers, which read the same file, give the same tokens.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, normalizers
from transformers import PreTrainedTokenizerFast

from saferedir.engines.errors import RequestError
from saferedir.export.tensor_files import check_numbers, read_tensors

#: Names of the one tensor in a file that is not the word's, in which case the file's own name is.
NAMELESS = ("emb_params", "*")
LONGEST_WORD = 80
SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")


def read_embedding(path: Path, word: str | None = None) -> tuple[str, torch.Tensor]:
    """The word of a textual inversion and its vectors [vectors, D].

    The word is `word` where it is given; else the name that a file in diffusers' format has inside, and of other formats, which
    are called by their file's name, that.

    Raises:
        RequestError: the file is damaged or of another kind, or the word is none.
    """
    raw = read_tensors(path, "textual inversion")
    if "string_to_param" in raw:
        raw = dict(raw["string_to_param"])
        raw = {"*": next(iter(raw.values()))} if len(raw) == 1 else raw
    if {"clip_g", "clip_l"} & raw.keys():
        raise RequestError(
            f"{path} is a textual inversion of Stable Diffusion XL, which has two text encoders; expected one of 1.x or 2.x"
        )
    if len(raw) != 1:
        raise RequestError(
            f"{path} holds {len(raw)} tensors, such as {next(iter(raw), None)!r}; expected the one of a textual inversion"
        )
    name, vectors = next(iter(raw.items()))
    check_numbers({name: vectors}, path)
    if vectors.ndim not in (1, 2) or not vectors.numel():
        raise RequestError(f"{path}: {name} has shape {tuple(vectors.shape)}; expected vectors [vectors, D]")
    word = word or (path.stem if name in NAMELESS else name)
    if not word or len(word) > LONGEST_WORD or not word.isprintable() or " " in word:
        raise RequestError(f"{path}: {word[:LONGEST_WORD]!r} cannot be typed as one word; name another by FILE:WORD")
    return word.lower(), vectors.detach().reshape(-1, vectors.shape[-1]).float()


def with_words(pipeline: Any, files: Sequence[tuple[Path, str | None]]) -> tuple[Any, dict[str, tuple[str, ...]]]:
    """A pipeline with textual inversions in its own tokenizer and text encoder, and word -> the tokens that it stands for.

    `files` are paths, and the words to call them by where these are not their own. What the text encoder makes of all other
    words stays the same, so that a safety module goes on fitting it.

    Raises:
        RequestError: a file is missing, of another width, or adds a word that is there already; the model is of another family.
    """
    if not hasattr(pipeline, "load_textual_inversion"):
        raise RequestError("textual inversions are for Stable Diffusion; this model is of another family")
    text_encoder = deepcopy(pipeline.text_encoder)
    width = text_encoder.get_input_embeddings().weight.shape[1]
    vectors: dict[str, torch.Tensor] = {}
    words: dict[str, tuple[str, ...]] = {}
    for path, given in files:
        word, found = read_embedding(path, given)
        if found.shape[1] != width:
            raise RequestError(f"{path} has vectors of width {found.shape[1]}; the text encoder's words have {width}")
        if len(found) > (room := pipeline.tokenizer.model_max_length - 2):
            raise RequestError(f"{path} has {len(found)} vectors, which no prompt holds; expected at most {room}")
        tokens = (word,) if len(found) == 1 else tuple(f"{word}_{index}" for index in range(len(found)))
        _check_new(path, word, tokens, words, pipeline.tokenizer)
        words[word] = tokens
        vectors |= dict(zip(tokens, found, strict=True))
    tokenizer = _reading(pipeline.tokenizer, words)
    text_encoder.resize_token_embeddings(max(len(tokenizer), text_encoder.config.vocab_size), mean_resizing=False)
    table = text_encoder.get_input_embeddings().weight
    with torch.no_grad():
        for token, vector in vectors.items():
            table[tokenizer.convert_tokens_to_ids(token)] = vector
    own = {"tokenizer": tokenizer, "text_encoder": text_encoder}
    return type(pipeline)(**{**pipeline.components, **own}, requires_safety_checker=False), words


def _check_new(path: Path, word: str, tokens: Sequence[str], others: dict[str, tuple[str, ...]], tokenizer: Any) -> None:
    """Raise `RequestError` where a word, or one of its tokens, is there already or would be read in another word."""
    known = tokenizer.get_vocab()
    if any(token in known or f"{token}</w>" in known for token in (word, *tokens)):
        raise RequestError(f"{path}: the word {word!r} is there already; name another by FILE:WORD")
    for other, taken in others.items():
        # diffusers reads `word_1` as the second vector of `word`.
        numbered = re.fullmatch(rf"({re.escape(word)}|{re.escape(other)})_\d+", max(word, other, key=len))
        if (
            word == other
            or set(tokens) & set(taken)
            or numbered
            or re.search(_whole(word), other)
            or re.search(_whole(other), word)
        ):
            raise RequestError(f"{path}: the word {word!r} cannot be told from {other!r}; name another by FILE:WORD")


def _whole(word: str) -> str:
    return rf"(?<!\w){re.escape(word)}(?!\w)"


def _reading(tokenizer: Any, words: dict[str, tuple[str, ...]]) -> Any:
    """A tokenizer that reads `words` as their tokens besides what `tokenizer` reads."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    spread = [normalizers.Replace(Regex(_whole(word)), " ".join(tokens)) for word, tokens in words.items() if tokens != (word,)]
    if spread:
        backend.normalizer = normalizers.Sequence([backend.normalizer, *spread])
    # CLIP's own class makes its normaliser anew when it is loaded; this one keeps it.
    reading = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=tokenizer.model_max_length,
        model_input_names=["input_ids", "attention_mask"],
        **{name: getattr(tokenizer, name) for name in SPECIAL},
    )
    reading.add_tokens([AddedToken(token, single_word=True, normalized=True) for own in words.values() for token in own])
    return reading
