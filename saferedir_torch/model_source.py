"""Where a model comes from: a folder in diffusers' format, the name of one on the hub, or one `.safetensors` file."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from saferedir.engines.errors import RequestError

#: Parts of a Stable Diffusion checkpoint in one file, by what the names of their tensors begin with.
PARTS = {
    "model.diffusion_model.": "UNet",
    "first_stage_model.": "VAE",
    "cond_stage_model.": "text encoder",
}
#: What else such a file may be, by a part of a tensor's name.
OTHERS = {
    "conditioner.embedders.": "a Stable Diffusion XL model, whose UNet is also conditioned past cross-attention",
    "joint_blocks.": "a Stable Diffusion 3 model, in which text and picture attend to each other jointly",
    "double_blocks.": "a Flux model, in which text and picture attend to each other jointly",
    "lora_": "a LoRA, which changes a model and is none",
    ".lora": "a LoRA, which changes a model and is none",
    "string_to_param": "a textual inversion, which adds words to a model and is none",
}
#: Embeddings that some checkpoints bring along, which are no part of the model.
BUNDLED = "bundle_emb."
#: Names of files of weights, whole or in pieces, with the variant that they are of.
WEIGHTS = re.compile(r"(?:diffusion_pytorch_model|pytorch_model|model)(?:\.([^.]+?))?(?:-\d+-of-\d+)?\.(?:safetensors|bin)")


def locate(model: str | Path) -> Path:
    """The folder or file of `model`; a hub name's folder is that of the hub's cache, which it is fetched to where needed.

    Raises:
        RequestError: there is no such folder or file, and no such name can be had from the hub.
    """
    path = Path(model)
    if path.exists():
        return path
    name = str(model)
    if name.count("/") != 1 or name.startswith((".", "/")) or path.suffix:
        raise RequestError(f"{model} does not exist; expected a diffusers folder, a hub name or a .safetensors file")
    from diffusers import StableDiffusionPipeline

    try:
        return Path(StableDiffusionPipeline.download(name))
    except Exception as error:  # huggingface_hub and httpx raise many types of their own
        raise RequestError(
            f"{name} is no folder here and cannot be had from the hub: {_first_line(error)}; name a folder, or fetch it first"
        ) from error


def pipeline_class(folder: Path) -> str:
    """What `model_index.json` of a diffusers folder says that its pipeline is; empty where it says nothing."""
    try:
        return str(json.loads((folder / "model_index.json").read_text(encoding="utf-8")).get("_class_name", ""))
    except (OSError, ValueError, AttributeError):
        return ""


def open_part(kind: Any, folder: Path) -> Any:
    """The part of a model in a folder of diffusers or transformers, in fp32, also where it is stored in half precision alone.

    Raises:
        RequestError: it is another kind of part, or weights are missing, which would be random, or are not its own.
    """
    try:
        stated = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        named = stated.get("_class_name") or next(iter(stated.get("architectures") or ()), None)
        if named not in (None, kind.__name__):
            raise ValueError(f"it is a {named}; expected a {kind.__name__}")
        part, info = kind.from_pretrained(
            folder, torch_dtype=torch.float32, variant=variant_of(folder), output_loading_info=True
        )
        lacking = [*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])]
        strange = [key for key in info["unexpected_keys"] if not key.endswith("position_ids")]
        for keys, what in ((lacking, "lacks"), (strange, "has no use for")):
            if keys:
                raise ValueError(f"it {what} {len(keys)} of its weights, such as {min(keys)}")
    except Exception as error:  # diffusers, transformers and safetensors raise several types of their own
        raise RequestError(f"{folder} cannot be used: {_first_line(error)}") from error
    return part


def variant_of(folder: Path) -> str | None:
    """`fp16`, or another variant, where the weights in a folder are there in that alone; None where there are plain ones."""
    matches = [match for path in folder.iterdir() if (match := WEIGHTS.fullmatch(path.name))]
    variants = {match[1] for match in matches}
    return None if None in variants or not variants else "fp16" if "fp16" in variants else min(variants)


def bundled_words(path: Path) -> list[str]:
    """Words whose embeddings a checkpoint in one file brings along. They are no part of the model, and none is added."""
    if not path.is_file():
        return []
    return sorted(
        {name.removeprefix(BUNDLED).partition(".string_to_param")[0] for name in _names(path) if name.startswith(BUNDLED)}
    )


def open_single_file(path: Path, config: str | Path | None = None, *, without_vae: bool = False) -> Any:
    """The pipeline of a Stable Diffusion checkpoint in one file, as its trainers publish it.

    Such a file has no configuration. `config` is the folder or hub name of a model of the same family that has: the hub's
    for that family by default. `without_vae` lets it lack a VAE, which then has to be replaced: its weights are random.

    Raises:
        RequestError: the file is of another kind, lacks a part, or does not fit the configuration.
    """
    from diffusers import AutoencoderKL, StableDiffusionPipeline

    missing = _missing_parts(path)
    if missing and not (without_vae and missing == ["VAE"]):
        hint = "; name another by --vae" if missing == ["VAE"] else ""
        raise RequestError(f"{path} has no {', no '.join(missing)}; expected a whole Stable Diffusion model{hint}")
    if missing and config is None:
        raise RequestError(f"{path} has no VAE, and nothing says what its VAE is like; name a folder of its family by --config")
    folder = None if config is None else locate(config)
    if folder is not None and not (folder / "model_index.json").is_file():
        raise RequestError(f"{folder} holds no model_index.json; expected the configuration of a diffusers model")
    try:
        given = {"vae": AutoencoderKL.from_config(AutoencoderKL.load_config(folder, subfolder="vae"))} if missing else {}
        pipeline = StableDiffusionPipeline.from_single_file(
            str(path), config=None if folder is None else str(folder), torch_dtype=torch.float32,
            safety_checker=None, feature_extractor=None, **given,
        )  # fmt: skip
        # diffusers leaves weights that the file does not hold without values.
        if empty := [name for name, weight in pipeline.text_encoder.named_parameters() if weight.is_meta]:
            raise ValueError(f"its text encoder lacks {len(empty)} of its weights, such as {empty[0]}")
        return pipeline
    except Exception as error:  # diffusers, transformers and huggingface_hub raise many types of their own
        if "meta tensor" in str(error):
            raise RequestError(f"{path} cannot be used: its UNet or its VAE lacks some of its weights") from error
        known = "" if config is not None else "; its configuration comes from the hub unless --config names a folder"
        raise RequestError(f"{path} cannot be opened as a Stable Diffusion model: {_first_line(error)}{known}") from error


def _missing_parts(path: Path) -> list[str]:
    """Parts that a Stable Diffusion checkpoint lacks; raises `RequestError` where the file is something else."""
    names = [name for name in _names(path) if not name.startswith(BUNDLED)]
    for mark, kind in OTHERS.items():
        if any(mark in name for name in names):
            raise RequestError(f"{path} is {kind}; expected a Stable Diffusion 1.x or 2.x model")
    return [part for prefix, part in PARTS.items() if not any(name.startswith(prefix) for name in names)]


def _names(path: Path) -> list[str]:
    """Names of a `.safetensors` file's tensors, of which its header alone is read."""
    if path.suffix != ".safetensors":
        raise RequestError(f"{path} is no .safetensors file; others may run code when they are opened, so convert it first")
    try:
        with safe_open(path, "pt") as file:
            return list(file.keys())
    except (OSError, SafetensorError) as error:
        raise RequestError(f"{path} is damaged or cut short: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
