"""Prompts found by gradient: tokens are swapped one at a time for what the gradient says would help most.

The search is greedy coordinate gradient (Zou et al. 2023, arXiv 2307.15043, algorithm 1), of many prompts at once. Only whole
words are used that the tokenizer reads back as the same token, since an attacker hands in text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

#: Embeddings of M variants of each of P prompts [P, M, T, D] -> what the attacker would have small [P, M], with a gradient.
Loss = Callable[[Tensor], Tensor]
WORD_END = "</w>"
#: Parts of a word that are this long give it away.
TELLING = 4
#: Say nothing of what they stand before.
ARTICLES = ("a", "an", "the")


class TextSide:
    """A CLIP text encoder that takes what its table says of tokens besides tokens, so that a prompt has a gradient."""

    def __init__(self, tokenizer: Any, text_encoder: Any) -> None:
        self.tokenizer, self.text_encoder = tokenizer, text_encoder
        #: [V, W].
        self.table: Tensor = text_encoder.get_input_embeddings().weight.detach()

    def tokens(self, prompts: Sequence[str]) -> Tensor:
        """Token ids [B, T], padded and cut as Stable Diffusion does."""
        ids: Tensor = self.tokenizer(list(prompts), padding="max_length", truncation=True, return_tensors="pt").input_ids
        return ids.to(self.table.device)

    def encode(self, ids: Tensor) -> Tensor:
        """[B, T] -> [B, T, D]."""
        embeds: Tensor = self.text_encoder(ids).last_hidden_state
        return embeds

    def encode_rows(self, ids: Tensor, rows: Tensor) -> Tensor:
        """Tokens [B, T], and rows [B, T, W] in place of those of the table -> [B, T, D]. The ids say where the prompt ends."""
        handle = self.text_encoder.get_input_embeddings().register_forward_hook(lambda *_: rows)
        try:
            return self.encode(ids)
        finally:
            handle.remove()

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
        return torch.tensor(sorted(usable), device=self.table.device)


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
    text_side: TextSide, prompts: Sequence[str], free: int, allowed: Tensor, loss: Loss, size: SearchSize | None = None, *,
    seed: int = 0,
) -> list[FoundPrompt]:  # fmt: skip
    """Each of `prompts` and `free` words behind it, chosen from the ids `allowed` for a small `loss`; never any of a larger
    loss than the words that it began with. The choices of the n-th prompt are drawn with `seed` + n.

    Raises:
        ValueError: prompt and words do not fit, or there is nothing to choose from.
    """
    size = size or SearchSize()
    if not len(allowed):
        raise ValueError("no word may be used; forbid fewer")
    generators = [torch.Generator().manual_seed(seed + row) for row in range(len(prompts))]

    def drawn(below: int, count: int) -> Tensor:
        return torch.stack([torch.randint(below, (count,), generator=own) for own in generators]).to(allowed.device)

    starts = [" ".join(text_side.text(token[None]) for token in allowed[row]) for row in drawn(len(allowed), free)]
    ids = text_side.tokens([f"{prompt} {words}".strip() for prompt, words in zip(prompts, starts, strict=True)])
    places = torch.stack([_places(text_side, prompt, ids, free) for prompt in prompts])  # [P, free]
    own = torch.arange(len(prompts), device=ids.device)[:, None]
    with torch.no_grad():
        before = values = loss(text_side.encode(ids)[:, None])[:, 0]
    for _ in range(size.iterations):
        gain = -_gradient(text_side, ids, loss)[own, places] @ text_side.table[allowed].T  # [P, free, allowed]
        best = allowed[gain.topk(min(size.best, len(allowed)), dim=2).indices]
        at = drawn(free, size.tries)  # [P, tries]
        token = best[own, at, drawn(best.shape[2], size.tries)]
        tried = ids[:, None].repeat(1, size.tries, 1)  # [P, tries, T]
        tried.scatter_(2, places.gather(1, at)[:, :, None], token[:, :, None])
        with torch.no_grad():
            found = loss(text_side.encode(tried.flatten(0, 1)).view(*tried.shape, -1))
        least, winner = found.min(dim=1)
        better = least < values
        ids = torch.where(better[:, None], tried[own[:, 0], winner], ids)
        values = torch.where(better, least, values)
    return [
        FoundPrompt(text_side.text(row), row, float(first), float(last))
        for row, first, last in zip(ids, before, values, strict=True)
    ]


def _places(text_side: TextSide, prompt: str, ids: Tensor, free: int) -> Tensor:
    """Where the free words stand: behind the prompt's own tokens and the begin mark."""
    first = 1 + len(text_side.tokenizer(prompt).input_ids[1:-1])
    if first + free >= ids.shape[1]:
        raise ValueError(f"{free} words more than {prompt!r} are over the {ids.shape[1]} tokens that a prompt has")
    return torch.arange(first, first + free, device=ids.device)


def _gradient(text_side: TextSide, ids: Tensor, loss: Loss) -> Tensor:
    """Of the loss, by what the table says of every token, [P, T, W]. Times the table it is by the weights of tokens."""
    rows = text_side.table[ids].requires_grad_()
    (gradient,) = torch.autograd.grad(loss(text_side.encode_rows(ids, rows)[:, None]).sum(), rows)
    return gradient


def optimise_embeddings(start: Tensor, loss: Loss, *, iterations: int = 60, rate: float = 0.02) -> Tensor:
    """Embeddings [P, T, D] of small `loss`, by Adam from `start`: what an attacker finds who hands in embeddings.

    `rate` is relative to the root mean square of `start`. Of each the best one met is given.
    """
    value = start.detach().clone().requires_grad_()
    optimiser = torch.optim.Adam([value], lr=rate * float(start.square().mean().sqrt()))
    best, least = start.detach().clone(), torch.full((len(start),), torch.inf, device=start.device)
    for _ in range(iterations + 1):
        optimiser.zero_grad()
        total = loss(value[:, None])[:, 0]
        better = total.detach() < least
        best = torch.where(better[:, None, None], value.detach(), best)
        least = torch.where(better, total.detach(), least)
        torch.autograd.backward(total.sum(), inputs=[value])
        optimiser.step()
    return best
