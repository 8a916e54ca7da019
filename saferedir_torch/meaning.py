"""What a prompt still asks for that was rewritten, or whose name was cut, by what the denoiser makes of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from saferedir_torch.precision import mixed_precision
from saferedir_torch.prompt_source import TrainingPair, changed_words
from saferedir_torch.trajectories import encode

#: Timestep at which noise predictions are compared: early, where what is drawn is decided.
DECIDED_AT = 960
#: Noises that they are compared on.
NOISES = 2
#: A prompt means what it was made of where its prediction lies this much nearer to that than to the rewrite's, and nothing
#: where it is the other way about.
NEARER = 1.5
SMALLEST = 1e-12
CHUNK = 256


@torch.no_grad()
def kept_meaning(pipeline: Any, hidden: Tensor, hidden_safe: Tensor, plain: Tensor, plain_safe: Tensor) -> Tensor:
    """Embeddings [R, T, D] of prompts that were rewritten and of their safe rewrites, and of both before -> [R].

    What a rewritten prompt changes in the noise predicted for its safe rewrite is compared with what the plain prompt changes
    in that for its own: words around both take no part in it. Returned is how much nearer it is to that than to no change, in
    squared distance; below 1 it is nearer to no change. No judge has a part in it, so that those which test stay independent.
    """
    config = pipeline.unet.config
    shape = (config.in_channels, config.sample_size, config.sample_size)
    nearer = []
    for rows in torch.split(torch.arange(len(hidden)), CHUNK):
        four = torch.cat([part[rows] for part in (hidden, hidden_safe, plain, plain_safe)]).to(pipeline.device, torch.float32)
        to_plain, to_none = torch.zeros(len(rows)), torch.zeros(len(rows))
        for seed in range(NOISES):
            noise = torch.randn((1, *shape), generator=torch.Generator().manual_seed(seed)).to(pipeline.device)
            with mixed_precision(pipeline.device):
                predicted = pipeline.unet(noise.expand(len(four), *shape), DECIDED_AT, four, return_dict=False)[0]
            unsafe, safe, before, safe_before = predicted.float().flatten(1).cpu().chunk(4)
            to_plain += ((unsafe - safe) - (before - safe_before)).square().sum(dim=1)
            to_none += (unsafe - safe).square().sum(dim=1)
        nearer.append(to_none / to_plain.clamp(min=SMALLEST))
    return torch.cat(nearer) if nearer else torch.zeros(0)


def confirmed(pipeline: Any, pairs: Sequence[TrainingPair]) -> list[TrainingPair]:
    """The pairs, those as they were again whose rewritten prompt no longer asks for what the plain one did: it would be a wrong
    label. What a long prompt says at its end may be cut off, or drowned in the rest."""
    rewritten = [row for row, pair in enumerate(pairs) if pair.plain]
    sides = ("unsafe", "safe", "plain", "plain_safe")
    nearer = _measured(pipeline, [tuple(getattr(pairs[row], side) for side in sides) for row in rewritten])
    checked = list(pairs)
    for row, kept in zip(rewritten, nearer, strict=True):
        if kept <= NEARER:
            pair = checked[row]
            checked[row] = replace(pair, unsafe=pair.plain, safe=pair.plain_safe, plain="", plain_safe="")
    return checked


class Parts(NamedTuple):
    """What is left of pairs whose name was cut to one of its words."""

    #: Those that still ask for the concept, with the whole pair's rewrite.
    asking: list[TrainingPair]
    #: Prompts that ask for nothing.
    harmless: list[str]


def parts_of_names(pipeline: Any, pairs: Sequence[TrainingPair], rng: np.random.Generator) -> Parts:
    """One word in place of each name of several: a word that stands in a concept's name need not mean it by itself.

    Those of which it is open are left out.
    """
    cut = [(pair, *words) for pair in pairs if (words := _one_word_left(pair, rng))]
    nearer = _measured(pipeline, [(left, none, pair.unsafe, none) for pair, left, none in cut])
    asking, harmless = [], []
    for (pair, left, _), kept in zip(cut, nearer, strict=True):
        if kept > NEARER:
            asking.append(replace(pair, unsafe=left))
        elif kept * NEARER < 1:
            harmless.append(left)
    return Parts(asking, harmless)


def _one_word_left(pair: TrainingPair, rng: np.random.Generator) -> tuple[str, str] | None:
    """The unsafe prompt of a plain pair with one word of its name, and with none.

    None where its name is a single word, or where it asks for more than one concept: one word may then mean one of them.
    """
    spans = changed_words(pair.unsafe, pair.safe)
    if pair.plain or len(pair.asked) != 1 or pair.asked != pair.replaced or len(spans) != 1:
        return None
    words = [word for word in spans[0].split(" ") if word not in pair.safe.split(" ")]
    if len(words) < 2:
        return None
    left, none = (pair.unsafe.replace(spans[0], word, 1) for word in (words[int(rng.integers(len(words)))], ""))
    return left, " ".join(none.split())


def _measured(pipeline: Any, prompts: Sequence[tuple[str, ...]]) -> list[float]:
    """`kept_meaning` of rows of a rewritten prompt, its safe one, the plain prompt and its safe one."""
    chunks = (prompts[start : start + CHUNK] for start in range(0, len(prompts), CHUNK))
    return [
        float(nearer)
        for chunk in chunks
        for nearer in kept_meaning(pipeline, *(encode(pipeline, list(side))[1] for side in zip(*chunk, strict=True)))
    ]
