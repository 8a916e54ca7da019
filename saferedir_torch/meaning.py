"""What a respelt prompt still asks for, by what the denoiser makes of it."""

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
#: A respelling means what it was made of where its prediction lies this much nearer to that than to the rewrite's.
NEARER = 1.5
CHUNK = 256


@torch.no_grad()
def still_means(pipeline: Any, respelt: Tensor, original: Tensor, rewrite: Tensor) -> Tensor:
    """Embeddings [R, T, D] of respelt prompts, of what they were made of and of its rewrites -> [R] bool.

    The squared distance of the noise predicted for the respelt prompt to that for the original is less than the one to the
    rewrite's, by the factor `NEARER`. No judge has a part in it, so that those which test stay independent.
    """
    config = pipeline.unet.config
    shape = (config.in_channels, config.sample_size, config.sample_size)
    means = []
    for rows in torch.split(torch.arange(len(respelt)), CHUNK):
        three = torch.cat([part[rows] for part in (respelt, original, rewrite)]).to(pipeline.device, torch.float32)
        to_original, to_rewrite = torch.zeros(len(rows)), torch.zeros(len(rows))
        for seed in range(NOISES):
            noise = torch.randn((1, *shape), generator=torch.Generator().manual_seed(seed)).to(pipeline.device)
            with mixed_precision(pipeline.device):
                predicted = pipeline.unet(noise.expand(len(three), *shape), DECIDED_AT, three, return_dict=False)[0]
            own, before, after = predicted.float().flatten(1).cpu().chunk(3)
            to_original += (own - before).square().sum(dim=1)
            to_rewrite += (own - after).square().sum(dim=1)
        means.append(to_original * NEARER < to_rewrite)
    return torch.cat(means) if means else torch.zeros(0, dtype=torch.bool)


def confirmed(pipeline: Any, pairs: Sequence[TrainingPair]) -> list[TrainingPair]:
    """The pairs, those with their plain spelling again whose respelt prompt no longer asks for what it was made of: it would
    be a wrong label."""
    respelt = [row for row, pair in enumerate(pairs) if pair.plain]
    sides = ("unsafe", "plain", "safe")
    kept = torch.cat(
        [
            still_means(pipeline, *(encode(pipeline, [getattr(pairs[row], side) for row in part])[1] for side in sides))
            for part in (respelt[start : start + CHUNK] for start in range(0, len(respelt), CHUNK))
        ]
        or [torch.zeros(0, dtype=torch.bool)]
    )
    checked = list(pairs)
    for row, fine in zip(respelt, kept.tolist(), strict=True):
        if not fine:
            checked[row] = replace(checked[row], unsafe=checked[row].plain, plain="")
    return checked
