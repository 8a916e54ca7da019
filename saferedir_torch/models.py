"""Where models come from: the shipped folders, and any diffusers folder or hub name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import AutoencoderKL, DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import logging as diffusers_logging
from transformers import CLIPTextModel
from transformers.utils import logging as transformers_logging

from saferedir.engines.errors import RequestError
from saferedir_torch.model_source import locate, open_part, open_single_file, pipeline_class, variant_of
from saferedir_torch.pixart import PROMPT_TOKENS, PixArt

SHIPPED = Path(__file__).with_name("shipped")
SHIPPED_MODEL = SHIPPED / "emoji-diffusion"
SHIPPED_SAFETY = SHIPPED / "safety"
#: Networks of a Stable Diffusion folder.
PARTS = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel}
DEVICES = ("auto", "cpu", "cuda")


def _open_folder(place: Path) -> Any:
    if pipeline_class(place) in PROMPT_TOKENS:
        # The precision is named, since the components' own default is the one they were saved in.
        variants = {variant_of(part) for part in place.iterdir() if part.is_dir()}
        variant = "fp16" if "fp16" in variants else None
        return PixArt.of(DiffusionPipeline.from_pretrained(place, torch_dtype=torch.float32, variant=variant))
    # Part by part, since what is not needed need not be there: many folders list a safety checker that they lack.
    try:
        parts = {name: open_part(kind, place / name) for name, kind in PARTS.items()}
        index = json.loads((place / "model_index.json").read_text(encoding="utf-8"))
        for name, library in (("tokenizer", transformers), ("scheduler", diffusers)):
            parts[name] = getattr(library, index[name][1]).from_pretrained(place / name)
    except Exception as error:  # diffusers and transformers raise several types of their own
        raise RequestError(f"{place} cannot be opened as a Stable Diffusion model: {error}") from error
    return StableDiffusionPipeline(**parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False)


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


def save_in_half(pipeline: Any, folder: Path) -> None:
    """Write the pipeline to `folder` with its weights in fp16, so that diffusers' defaults open it in fp32, all parts alike.

    Where its parts were read from is left out: folders of the machine that made it.
    """
    pipeline.to(torch.float16).save_pretrained(folder)
    for config in folder.glob("*/config.json"):
        raw = json.loads(config.read_text(encoding="utf-8"))
        raw.pop("_name_or_path", None)
        if config.parent.name == "text_encoder":
            raw["dtype"] = "float32"  # transformers computes in the type that this names, diffusers in fp32
        config.write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")


def load_pipeline(model: str | Path = SHIPPED_MODEL, config: str | Path | None = None, *, without_vae: bool = False) -> Any:
    """The pipeline of a folder, a hub name or one `.safetensors` file, in fp32, without progress bars; one of another family
    has Stable Diffusion's parts under their names.

    `config` is where the configuration of a single file comes from: a folder or hub name of the same family. `without_vae` lets
    such a file lack its VAE, which then has to be replaced.

    Raises:
        FileNotFoundError: the shipped model is not there (a source checkout without its weights).
        RequestError: there is no such model, or the file holds none.
    """
    if Path(model) == SHIPPED_MODEL and not SHIPPED_MODEL.is_dir():
        raise FileNotFoundError(f"{SHIPPED_MODEL} is missing; build it with `python -m saferedir_torch.world`, or restore it")
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    place = locate(model)
    if config is not None and not place.is_file():
        raise RequestError(f"{model} has a configuration of its own; one is named for a single file alone")
    pipeline: Any = open_single_file(place, config, without_vae=without_vae) if place.is_file() else _open_folder(place)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
