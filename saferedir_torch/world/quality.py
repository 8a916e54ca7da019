"""How well the base model draws what it is asked for, by every name, as the judge sees it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from saferedir_torch.trajectories import decode, encode, initial_noise, sample
from saferedir_torch.world.batches import save_sheet
from saferedir_torch.world.judge import Judge
from saferedir_torch.world.vocabulary import load_vocabulary

FOUND = 0.5


def base_quality(
    pipeline: StableDiffusionPipeline,
    judge: Judge,
    *,
    seed: int = 0,
    pairs: int = 240,
    per_name: int = 2,
    guidance_scale: float = 5.0,
    steps: int = 25,
    sheet: Path | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Shares of pictures in which the judge finds what was asked: single objects by every name, pairs, styles.

    Every name is drawn `per_name` times with styles in turn; `sheet` gets a contact sheet of the pictures.
    """
    vocabulary = load_vocabulary()
    keys, styles = vocabulary.object_keys, vocabulary.style_keys
    rng = np.random.default_rng([seed, 51])
    singles = [(key, name) for key in keys for name in vocabulary.objects[key].names for _ in range(per_name)]
    asked: list[tuple[tuple[str, ...], str, str]] = []
    for index, (key, name) in enumerate(singles):
        style = styles[index % len(styles)]
        phrases = vocabulary.styles[style]
        asked.append(((key,), style, f"{name} {phrases[rng.integers(len(phrases))]}"))
    for _ in range(pairs):
        left, right = (keys[i] for i in rng.choice(len(keys), size=2, replace=False))
        style = styles[rng.integers(len(styles))]
        phrase = vocabulary.styles[style][rng.integers(len(vocabulary.styles[style]))]
        names = [vocabulary.objects[key].names for key in (left, right)]
        text = " next to ".join(options[rng.integers(len(options))] for options in names)
        asked.append(((left, right), style, f"{text} {phrase}"))
    say(f"drawing {len(asked)} pictures")
    pictures = _draw(pipeline, [prompt for *_, prompt in asked], rng, steps, guidance_scale)
    opinion = judge.judge(pictures)
    found = opinion.objects >= FOUND
    hits: dict[str, list[bool]] = defaultdict(list)
    by_name: dict[str, list[bool]] = defaultdict(list)
    by_style: dict[str, list[bool]] = defaultdict(list)
    for row, (objects, style, _) in enumerate(asked):
        hit = all(bool(found[row, keys.index(key)]) for key in objects)
        hits["single" if len(objects) == 1 else "pair"].append(hit)
        styled = int(opinion.style[row].argmax()) == styles.index(style)
        hits["style"].append(styled)
        by_style[style].append(styled)
        if len(objects) == 1:
            by_name[f"{objects[0]}: {singles[row][1]}"].append(hit)
    if sheet is not None:
        save_sheet(pictures, sheet, columns=24)
    worst = sorted(by_name.items(), key=lambda item: (np.mean(item[1]), item[0]))[:12]
    return {
        "pictures": len(asked),
        "guidance_scale": guidance_scale,
        "steps": steps,
        **{key: float(np.mean(value)) for key, value in hits.items()},
        "names_drawn_every_time": float(np.mean([all(value) for value in by_name.values()])),
        "worst_names": {name: float(np.mean(value)) for name, value in worst},
        "styles": {name: float(np.mean(value)) for name, value in by_style.items()},
    }


def _draw(
    pipeline: StableDiffusionPipeline, prompts: list[str], rng: np.random.Generator, steps: int, guidance_scale: float
) -> Tensor:
    _, empty = encode(pipeline, [""])
    pictures = []
    for start in range(0, len(prompts), 64):
        chunk = prompts[start : start + 64]
        noise = initial_noise(pipeline, [int(value) for value in rng.integers(2**31, size=len(chunk))])
        drawn = sample(pipeline, encode(pipeline, chunk)[1], empty, noise, steps=steps, guidance_scale=guidance_scale)
        pictures.append(decode(pipeline, drawn.final))
    return torch.cat(pictures)
