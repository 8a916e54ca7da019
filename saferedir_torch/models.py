"""Where models come from: the shipped folders, and any diffusers folder or hub name."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

SHIPPED = Path(__file__).with_name("shipped")
SHIPPED_MODEL = SHIPPED / "emoji-diffusion"
SHIPPED_SAFETY = SHIPPED / "safety"
DEVICES = ("auto", "cpu", "cuda")


def device_called(name: str) -> torch.device:
    """The device of that name; `auto` is the GPU where there is one.

    Raises:
        ValueError: there is no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name not in DEVICES or (name == "cuda" and not torch.cuda.is_available()):
        raise ValueError(f"device {name!r} cannot be had here; expected {', '.join(DEVICES)}, and a GPU for cuda")
    return torch.device(name)


def load_pipeline(model: str | Path = SHIPPED_MODEL) -> StableDiffusionPipeline:
    """The pipeline of a folder or hub name, in fp32, without progress bars.

    Raises:
        FileNotFoundError: the shipped model is not there (a source checkout without its weights).
    """
    if Path(model) == SHIPPED_MODEL and not SHIPPED_MODEL.is_dir():
        raise FileNotFoundError(f"{SHIPPED_MODEL} is missing; build it with `python -m saferedir_torch.world`, or restore it")
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    # Named here, since the components' own default is the precision they were saved in.
    pipeline: StableDiffusionPipeline = StableDiffusionPipeline.from_pretrained(model, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
