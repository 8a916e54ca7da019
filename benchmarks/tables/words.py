"""What is looked at and what is moved: scores over the steps and masks over the words, for a few prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.contact_sheet import save_rows
from benchmarks.drawing import plain_of
from saferedir.runtime import Pipeline
from saferedir.runtime.demo import DEMO_PROMPTS

SEED = 40


def words(protected: Pipeline, sheets: Path) -> dict[str, Any]:
    """The demonstration's prompts, both ways: tokens, masks, scores, and a sheet (above unprotected, below protected)."""
    prompts = [prompt for _, prompt in DEMO_PROMPTS]
    before, after = plain_of(protected)(prompts, seed=SEED), protected(prompts, seed=SEED)
    save_rows([np.stack([np.asarray(image) for image in row.images]) for row in (before, after)], sheets / "words.png")
    return {
        "seed": SEED,
        "thresholds": {concept.name: concept.threshold for concept in protected.manifest.safety.concepts},
        "prompts": [
            {
                "prompt": prompt,
                "note": note,
                "tokens": list(record.tokens),
                "mask": {
                    name: [round(value, 3) for value in mask[: len(record.tokens)]] for name, mask in record.token_mask.items()
                },
                "scores": {
                    name: [round(step.score[name], 5) for step in record.steps]
                    for name in (concept.name for concept in protected.manifest.safety.concepts)
                },
                "fired": [list(step.fired) for step in record.steps],
            }
            for (note, prompt), record in zip(DEMO_PROMPTS, after.records, strict=True)
        ],
    }
