"""What a prompt still asks for that was rewritten to hide it, by what the denoiser makes of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from saferedir_torch.precision import mixed_precision
from saferedir_torch.prompt_source import TrainingPair
from saferedir_torch.trajectories import encode

#: Timestep at which noise predictions are compared: early, where what is drawn is decided.
DECIDED_AT = 960
#: Noises that they are compared on.
NOISES = 2
#: A prompt means what it was made of where its prediction lies this much nearer to that than to the rewrite's.
NEARER = 1.5
CHUNK = 256


@torch.no_grad()
def still_means(pipeline: Any, hidden: Tensor, hidden_safe: Tensor, plain: Tensor, plain_safe: Tensor) -> Tensor:
    """Embeddings [R, T, D] of prompts that were rewritten and of their safe rewrites, and of both before -> [R] bool.

    What a rewritten prompt changes in the noise predicted for its safe rewrite is compared with what the plain prompt changes
    in that for its own: words around both take no part in it. It is to be nearer to that than to no change, by the factor
    `NEARER` in squared distance. No judge has a part in it, so that those which test stay independent.
    """
    config = pipeline.unet.config
    shape = (config.in_channels, config.sample_size, config.sample_size)
    means = []
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
        means.append(to_plain * NEARER < to_none)
    return torch.cat(means) if means else torch.zeros(0, dtype=torch.bool)


def confirmed(pipeline: Any, pairs: Sequence[TrainingPair]) -> list[TrainingPair]:
    """The pairs, those as they were again whose rewritten prompt no longer asks for what the plain one did: it would be a wrong
    label. What a long prompt says at its end may be cut off, or drowned in the rest."""
    rewritten = [row for row, pair in enumerate(pairs) if pair.plain]
    sides = ("unsafe", "safe", "plain", "plain_safe")
    kept = torch.cat(
        [
            still_means(pipeline, *(encode(pipeline, [getattr(pairs[row], side) for row in part])[1] for side in sides))
            for part in (rewritten[start : start + CHUNK] for start in range(0, len(rewritten), CHUNK))
        ]
        or [torch.zeros(0, dtype=torch.bool)]
    )
    checked = list(pairs)
    for row, fine in zip(rewritten, kept.tolist(), strict=True):
        if not fine:
            pair = checked[row]
            checked[row] = replace(pair, unsafe=pair.plain, safe=pair.plain_safe, plain="", plain_safe="")
    return checked
