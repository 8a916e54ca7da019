"""One short picture by an eager pipeline."""

from __future__ import annotations

from typing import Any

import torch

UNSAFE, SAFE = "a church next to a cat", "a dog on blue"
STEPS = 2


def draw(pipe: Any, prompt: str = UNSAFE, seed: int = 1, **options: Any) -> Any:
    options = {"num_inference_steps": STEPS, "guidance_scale": 5.0, "output_type": "np"} | options
    return pipe(prompt, generator=torch.Generator().manual_seed(seed), **options)
