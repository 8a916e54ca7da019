"""A diffusers model without any safety, as a technique."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from saferedir_torch.models import device_called, load_pipeline


class DiffusersModel:
    """Any pipeline that diffusers opens; the seed is that of its generator."""

    def __init__(self, model: str, device: str = "auto", num_inference_steps: int = 25, guidance_scale: float = 5.0) -> None:
        """`model` is a folder, a hub name or one `.safetensors` file."""
        self.pipeline = load_pipeline(Path(model)).to(device_called(device))
        self._options: dict[str, Any] = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale}

    def generate(self, prompts: Sequence[str], seed: int | None = None, **options: Any) -> list[Image.Image]:
        """A picture a prompt, or an embedding where `prompt_embeds` are given; the seeds count up from `seed`."""
        embeds = options.get("prompt_embeds")
        asked, count = (list(prompts), len(prompts)) if embeds is None else (None, len(embeds))
        generators = [torch.Generator().manual_seed((seed or 0) + row) for row in range(count)]
        made: list[Image.Image] = self.pipeline(asked, generator=generators, **{**self._options, **options}).images
        return made
