"""Prompt pairs that safety training reads: embeddings of unsafe prompts, and of their safe rewrites in the same order."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from saferedir.engines.errors import TrainingError
from saferedir_torch.alignment import aligned_targets
from saferedir_torch.meaning import confirmed, parts_of_names
from saferedir_torch.prompt_source import PromptSource, flags
from saferedir_torch.trajectories import encode

#: Of the pairs, how many prompts that ask for nothing there are beside them: safe rewrites, and benign ones.
REWRITES_SHARE, BENIGN_SHARE = 0.4, 1.0
#: Share of the pairs whose names are cut to one word, to be pairs or benign prompts beside them.
PARTS_SHARE = 0.4
CHUNK = 128


@dataclass
class PairBank:
    """Prompt embeddings and their aligned safe targets, [P, T, D] fp16.

    `asked` [P, N]: the prompt asks for the concept by words that are known to mean it. `replaced` [P, N]: the target is
    without it, which is what a redirection with these concepts active should draw. Both are 0 where nothing is to change.
    `words` [P, T]: the token of the original stands before its end-of-text.
    """

    original: Tensor
    target: Tensor
    asked: Tensor
    replaced: Tensor
    words: Tensor

    def to(self, device: torch.device | str) -> PairBank:
        """The same on another device."""
        return PairBank(*(value.to(device) for value in vars(self).values()))


def cached_pairs(path: Path, make: Callable[[], PairBank], made_of: str) -> PairBank:
    """The pairs in `path`, made and saved, whole or not at all, where it is missing.

    Raises:
        TrainingError: the file is damaged, or states that it was made of something else.
    """
    if not path.exists():
        pairs = make()
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        save_file({name: value.contiguous() for name, value in vars(pairs).items()}, partial, metadata={"of": made_of})
        os.replace(partial, path)
        return pairs
    try:
        with safe_open(path, "pt") as file:
            stated = file.metadata()["of"]
        pairs = PairBank(**load_file(path))
    except (OSError, SafetensorError, KeyError, TypeError) as error:
        raise TrainingError(f"{path} holds no prompt pairs ({error}); delete it to make them anew") from error
    if stated != made_of:
        raise TrainingError(f"{path} holds pairs of another model, concepts, number or seed; give another folder")
    return pairs


def make_pairs(
    pipeline: StableDiffusionPipeline,
    source: PromptSource,
    *,
    count: int,
    seed: int,
    on_progress: Callable[[int, int], None] | None = None,
) -> PairBank:
    """`count` pairs a concept, and safe rewrites and benign prompts beside them, to be left alone."""
    end_id, concepts = pipeline.tokenizer.eos_token_id, list(source.replacements)
    banks: list[tuple[Tensor, ...]] = []
    for index, concept in enumerate(concepts):
        rng = np.random.default_rng([seed, 21, index])
        for start in range(0, count, CHUNK):
            size = min(CHUNK, count - start)
            pairs = confirmed(pipeline, [source.varied_pair(concept, rng) for _ in range(size)])
            parts = parts_of_names(pipeline, pairs[: round(size * PARTS_SHARE)], rng)
            pairs += parts.asking
            unsafe_ids, unsafe = encode(pipeline, [pair.unsafe for pair in pairs])
            safe_ids, safe = encode(pipeline, [pair.safe for pair in pairs])
            clean = [row for row, pair in enumerate(pairs) if set(pair.asked) <= set(pair.replaced)]
            clean = clean[: round(size * REWRITES_SHARE)]
            harmless = [source.varied_benign(rng) for _ in range(round(size * BENIGN_SHARE))] + parts.harmless
            benign_ids, benign = encode(pipeline, harmless)
            untouched, nothing = torch.cat([safe[clean], benign]).half(), torch.zeros(len(clean) + len(benign), len(concepts))
            banks.append((
                torch.cat([unsafe.half(), untouched]),
                torch.cat([aligned_targets(unsafe_ids, safe_ids, unsafe, safe, end_id).half(), untouched]),
                torch.cat([torch.tensor(flags([pair.asked for pair in pairs], concepts)), nothing]),
                torch.cat([torch.tensor(flags([pair.replaced for pair in pairs], concepts)), nothing]),
                _before_end(torch.cat([unsafe_ids, safe_ids[clean], benign_ids]), end_id),
            ))  # fmt: skip
            if on_progress is not None:
                on_progress(index * count + start + size, count * len(concepts))
    return PairBank(*(torch.cat(tensors) for tensors in zip(*banks, strict=True)))


def _before_end(ids: Tensor, end_id: int) -> Tensor:
    """ids [P, T] -> [P, T], true before the first `end_id`."""
    return (ids == end_id).int().cumsum(dim=1) == 0
