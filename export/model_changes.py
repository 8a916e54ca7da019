"""What is done to a model before it is exported: LoRAs fused in, another VAE, layers skipped, words added."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from saferedir.engines.errors import MissingDependencyError, RequestError


@dataclass(frozen=True, kw_only=True)
class ModelChanges:
    """Changes of a pipeline, in the order in which they are made."""

    #: File and scale.
    loras: tuple[tuple[Path, float], ...] = ()
    #: Folder of a diffusers VAE.
    vae: Path | None = None
    #: Last layers of the text encoder to leave out, as diffusers counts them.
    clip_skip: int = 0


def change(pipeline: Any, changes: ModelChanges) -> Any:
    """Fuse LoRAs, put the VAE in and cut the text encoder, in place. Words are added by `with_words`.

    Raises:
        RequestError: a file is missing or does not fit the model; the message names it.
        MissingDependencyError: a LoRA is named and peft is not installed.
    """
    if (changes.loras or changes.clip_skip) and not hasattr(pipeline, "load_lora_weights"):
        raise RequestError("LoRAs and skipped layers are for Stable Diffusion; this model is of another family")
    for path, scale in changes.loras:
        _fuse(pipeline, path, scale)
    if changes.vae is not None:
        pipeline.register_modules(vae=_vae(pipeline, changes.vae))
    if changes.clip_skip:
        _cut(pipeline.text_encoder, changes.clip_skip)
    return pipeline


def with_words(pipeline: Any, paths: tuple[Path, ...]) -> tuple[Any, dict[str, tuple[str, ...]]]:
    """A pipeline with textual inversions in its own tokenizer and text encoder, and word -> the tokens that it stands for.

    What the text encoder makes of all other words stays the same, so that a safety module goes on fitting it.

    Raises:
        RequestError: a file is missing, of another width, or adds a word that is there already.
    """
    own = {name: deepcopy(getattr(pipeline, name)) for name in ("tokenizer", "text_encoder")}
    pipeline = type(pipeline)(**{**pipeline.components, **own}, requires_safety_checker=False)
    added: dict[str, tuple[str, ...]] = {}
    for path in paths:
        before = set(pipeline.tokenizer.get_vocab())
        with _named(path, "textual inversion"):
            pipeline.load_textual_inversion(path)
        tokens = sorted(set(pipeline.tokenizer.get_vocab()) - before, key=pipeline.tokenizer.convert_tokens_to_ids)
        added[tokens[0]] = tuple(tokens)
    return pipeline, added


def _cut(text_encoder: Any, skipped: int) -> None:
    encoder = getattr(text_encoder, "text_model", text_encoder).encoder  # a level less from transformers 5 on
    layers = len(encoder.layers)
    if not 0 < skipped < layers:
        raise RequestError(f"clip skip is {skipped}; expected 0 to {layers - 1} of this text encoder")
    encoder.layers = encoder.layers[:-skipped]
    text_encoder.config.num_hidden_layers = layers - skipped


def _fuse(pipeline: Any, path: Path, scale: float) -> None:
    if find_spec("peft") is None:
        raise MissingDependencyError("LoRAs need the package peft; install saferedir[export]")
    with _named(path, "LoRA"):
        pipeline.load_lora_weights(path.parent, weight_name=path.name, adapter_name="given")
        if not pipeline.get_active_adapters():
            raise ValueError("none of its weights belongs to this model")
        pipeline.fuse_lora(lora_scale=scale, safe_fusing=True)
        pipeline.unload_lora_weights()


def _vae(pipeline: Any, folder: Path) -> Any:
    from diffusers import AutoencoderKL

    with _named(folder, "VAE"):
        vae = AutoencoderKL.from_pretrained(folder)
        if (found := vae.config.latent_channels) != (expected := pipeline.unet.config.in_channels):
            raise ValueError(f"it has {found} latent channels, the UNet {expected}")
    return vae


@contextmanager
def _named(path: Path, what: str) -> Iterator[None]:
    """Failures inside become a `RequestError` that names the file."""
    if not path.exists():
        raise RequestError(f"{path} does not exist; expected a {what}")
    try:
        yield
    except Exception as error:  # diffusers, peft and safetensors raise several types of their own
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise RequestError(f"{path} cannot be used as a {what} here: {reason}") from error
