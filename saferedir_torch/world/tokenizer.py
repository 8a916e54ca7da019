"""Trains the CLIP tokenizer: byte-level BPE over captions of this world; unknown words fall apart into bytes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTokenizer

from saferedir_torch.world.captions import varied_caption
from saferedir_torch.world.scenes import random_scene

MAX_TOKENS = 77
WORD_END = "</w>"
START, END = "<|startoftext|>", "<|endoftext|>"


def train_tokenizer(folder: Path, *, seed: int = 0, captions: int = 60_000, merges: int = 4000) -> Path:
    """Train on `captions` random captions, save to `folder/tokenizer` and return that path."""
    rng = np.random.default_rng([seed, 0])
    corpus = (varied_caption(random_scene(rng), rng) for _ in range(captions))
    out = folder / "tokenizer"
    CLIPTokenizer(*_learn(corpus, merges), model_max_length=MAX_TOKENS).save_pretrained(out)
    return out


def _learn(corpus, merges: int) -> tuple[dict[str, int], list[tuple[str, str]]]:  # type: ignore[no-untyped-def]
    """Vocabulary in CLIP's order (bytes, bytes that end a word, merges, start, end) and the merge list."""
    clip = CLIPTokenizer().backend_tokenizer
    learner = Tokenizer(models.BPE(end_of_word_suffix=WORD_END))
    learner.normalizer = clip.normalizer
    learner.pre_tokenizer = clip.pre_tokenizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    learner.train_from_iterator(
        corpus,
        trainers.BpeTrainer(
            vocab_size=len(alphabet) * 2 + merges,
            min_frequency=20,
            initial_alphabet=alphabet,
            end_of_word_suffix=WORD_END,
            show_progress=False,
        ),
    )
    learned = learner.get_vocab()
    base = set(alphabet) | {letter + WORD_END for letter in alphabet}
    merged = sorted((token for token in learned if token not in base), key=learned.__getitem__)
    vocabulary = [*alphabet, *(letter + WORD_END for letter in alphabet), *merged, START, END]
    return {token: index for index, token in enumerate(vocabulary)}, _merges(learner)


def _merges(learner: Tokenizer) -> list[tuple[str, str]]:
    import json

    pairs = json.loads(learner.to_str())["model"]["merges"]
    return [(left, right) for left, right in pairs]
