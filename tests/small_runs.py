"""Recorded runs of noise, which is all the same to what reads them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from small_module import TOKENS, WIDTH

from saferedir_torch.runs import RunBank


def small_bank(runs: int, steps: int, concepts: Sequence[str] = (), **wishes: Any) -> RunBank:
    """`runs` of `steps` each, of a prompt that asks for nothing; `wishes` are other fields of the bank."""
    draw = torch.Generator().manual_seed(3)
    rows, nothing = runs * steps, torch.zeros(runs * steps, len(concepts))
    latent, denoised = torch.randn(2, rows, 4, 8, 8, generator=draw).half()
    usual: dict[str, Any] = {
        "latent": latent, "denoised": denoised,
        "share": torch.linspace(0.95, 0.05, steps).repeat(runs), "first": (torch.arange(steps) == 0).repeat(runs),
        "prompt": torch.arange(runs).repeat_interleave(steps), "negative": torch.full((rows,), runs),
        "prompts": torch.randn(runs + 1, TOKENS, WIDTH, generator=draw).half(), "asked": nothing, "shown": nothing.clone(),
        "run": torch.arange(runs).repeat_interleave(steps), "guidance": torch.full((rows,), 5.0),
    }  # fmt: skip
    return RunBank(concepts=tuple(concepts), **(usual | wishes))
