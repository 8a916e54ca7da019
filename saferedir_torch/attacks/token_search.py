"""Prompts found by gradient: tokens are swapped one at a time for what the gradient says would help most.

The search is greedy coordinate gradient (Zou et al. 2023, arXiv 2307.15043, algorithm 1). Only whole words are used that the
tokenizer reads back as the same token, since an attacker hands in text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

#: Prompt embeddings [N, T, D] -> what the attacker would have small [N], with a gradient.
Loss = Callable[[Tensor], Tensor]
WORD_END = "</w>"
#: Parts of a word that are this long give it away.
TELLING = 4
#: Say nothing of what they stand before.
ARTICLES = ("a", "an", "the")


class TextSide:
    """A CLIP text encoder that takes mixtures of tokens besides tokens, so that a prompt has a gradient."""

    def __init__(self, tokenizer: Any, text_encoder: Any) -> None:
        self.tokenizer, self.text_encoder = tokenizer, text_encoder
        self._table: Tensor = text_encoder.get_input_embeddings().weight.detach()

    def tokens(self, prompts: Sequence[str]) -> Tensor:
        """Token ids [B, T], padded and cut as Stable Diffusion does."""
        ids: Tensor = self.tokenizer(list(prompts), padding="max_length", truncation=True, return_tensors="pt").input_ids
        return ids.to(self._table.device)

    def encode(self, ids: Tensor) -> Tensor:
        """[B, T] -> [B, T, D]."""
        embeds: Tensor = self.text_encoder(ids).last_hidden_state
        return embeds

    def encode_mixture(self, weights: Tensor) -> Tensor:
        """Weights of all tokens [B, T, V] -> [B, T, D]; of a single token each, the same as `encode`."""
        ids = weights.argmax(dim=2)
        mixed = weights @ self._table
        handle = self.text_encoder.get_input_embeddings().register_forward_hook(lambda *_: mixed)
        try:
            return self.encode(ids)
        finally:
            handle.remove()

    @property
    def vocabulary_size(self) -> int:
        return len(self._table)

    def text(self, ids: Tensor) -> str:
        """The prompt that token ids [T] stand for, without beginning, end and padding."""
        decoded: str = self.tokenizer.decode(ids, skip_special_tokens=True)
        return decoded.strip()

    def words(self, forbidden: Sequence[str]) -> Tensor:
        """Ids of the tokens that are words of letters, are read back as themselves, and give away no word of `forbidden`."""
        banned = {word for name in forbidden for word in name.lower().split() if word not in ARTICLES}
        usable = []
        for token, number in self.tokenizer.get_vocab().items():
            word = token.removesuffix(WORD_END)
            if not token.endswith(WORD_END) or not word.isalpha() or not word.isascii() or word.lower() != word:
                continue
            if any(_gives_away(word, other) for other in banned):
                continue
            if self.tokenizer(word).input_ids[1:-1] == [number]:
                usable.append(number)
        return torch.tensor(sorted(usable), device=self._table.device)


def _gives_away(word: str, other: str) -> bool:
    return word == other or (len(word) >= TELLING and word in other) or (len(other) >= TELLING and other in word)


@dataclass(frozen=True)
class SearchSize:
    """How long to search."""

    iterations: int = 40
    #: Of the tokens that the gradient says are best, at each place.
    best: int = 32
    #: Swaps that are tried, an iteration.
    tries: int = 32


@dataclass(frozen=True)
class FoundPrompt:
    """What a search came to."""

    prompt: str
    #: [T].
    ids: Tensor
    #: Of the prompt it began with, and of this one.
    loss_before: float
    loss: float


def search(
    text_side: TextSide, prompt: str, free: int, allowed: Tensor, loss: Loss, size: SearchSize | None = None, *, seed: int = 0
) -> FoundPrompt:
    """`prompt` and `free` words behind it, chosen from the ids `allowed` for a small `loss`; never one of a larger loss than
    the words that it began with.

    Raises:
        ValueError: prompt and words do not fit, or there is nothing to choose from.
    """
    size = size or SearchSize()
    if not len(allowed):
        raise ValueError("no word may be used; forbid fewer")
    generator = torch.Generator().manual_seed(seed)
    start = allowed[torch.randint(len(allowed), (free,), generator=generator)]
    words = " ".join(text_side.text(token[None]) for token in start)
    ids = text_side.tokens([f"{prompt} {words}".strip()])[0]
    places = _places(text_side, prompt, ids, free)
    with torch.no_grad():
        value = before = float(loss(text_side.encode(ids[None]))[0])
    for _ in range(size.iterations):
        gradient = _gradient(text_side, ids, loss)[places][:, allowed]  # [free, allowed]
        best = allowed[(-gradient).topk(min(size.best, len(allowed)), dim=1).indices.cpu()]
        at = torch.randint(free, (size.tries,), generator=generator)
        token = best[at, torch.randint(best.shape[1], (size.tries,), generator=generator)]
        tried = ids.repeat(size.tries, 1)
        tried[torch.arange(size.tries), places[at]] = token
        with torch.no_grad():
            values = loss(text_side.encode(tried))
        winner = int(values.argmin())
        if float(values[winner]) < value:
            ids, value = tried[winner], float(values[winner])
    return FoundPrompt(text_side.text(ids), ids, before, value)


def _places(text_side: TextSide, prompt: str, ids: Tensor, free: int) -> Tensor:
    """Where the free words stand: behind the prompt's own tokens and the begin mark."""
    first = 1 + len(text_side.tokenizer(prompt).input_ids[1:-1])
    if first + free >= len(ids):
        raise ValueError(f"{free} words more than {prompt!r} are over the {len(ids)} tokens that a prompt has")
    return torch.arange(first, first + free)


def _gradient(text_side: TextSide, ids: Tensor, loss: Loss) -> Tensor:
    """Of the loss, by the weight of every token at every place, [T, V]."""
    weights = torch.nn.functional.one_hot(ids[None], text_side.vocabulary_size).float().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(text_side.encode_mixture(weights)).sum(), weights)
    return gradient[0]


def optimise_embedding(start: Tensor, loss: Loss, *, iterations: int = 60, rate: float = 0.02) -> Tensor:
    """An embedding [1, T, D] of small `loss`, by Adam from `start`: what an attacker finds who hands in embeddings.

    `rate` is relative to the root mean square of `start`. The best one met is given.
    """
    value = start.detach().clone().requires_grad_()
    optimiser = torch.optim.Adam([value], lr=rate * float(start.square().mean().sqrt()))
    best, least = start.detach().clone(), float("inf")
    for _ in range(iterations + 1):
        optimiser.zero_grad()
        total = loss(value).sum()
        if float(total) < least:
            best, least = value.detach().clone(), float(total)
        torch.autograd.backward(total, inputs=[value])
        optimiser.step()
    return best
