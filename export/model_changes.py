"""What is done to a model before it is exported: LoRAs fused in, another VAE, layers skipped. `with_words` adds words."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saferedir.engines.errors import RequestError
from saferedir.export.lora import fuse_lora
from saferedir.export.other_vae import open_vae


@dataclass(frozen=True, kw_only=True)
class ModelChanges:
    """Changes of a pipeline, in the order in which they are made."""

    #: File and scale.
    loras: tuple[tuple[Path, float], ...] = ()
    #: Folder of a diffusers VAE, or one file.
    vae: Path | None = None
    #: Last layers of the text encoder to leave out, as diffusers counts them.
    clip_skip: int = 0


def change(pipeline: Any, changes: ModelChanges, on_note: Callable[[str], None] = lambda _: None) -> Any:
    """Fuse LoRAs, put the VAE in and cut the text encoder, in place. `on_note` is told what each LoRA changed.

    Raises:
        RequestError: a file is missing or does not fit the model; the message names it.
    """
    if (changes.loras or changes.clip_skip) and not hasattr(pipeline, "load_lora_weights"):
        raise RequestError("LoRAs and skipped layers are for Stable Diffusion; this model is of another family")
    for path, scale in changes.loras:
        on_note(fuse_lora(pipeline, path, scale))
    if changes.vae is not None:
        pipeline.register_modules(vae=open_vae(changes.vae, pipeline.vae))
    if changes.clip_skip:
        _cut(pipeline.text_encoder, changes.clip_skip)
    return pipeline


def _cut(text_encoder: Any, skipped: int) -> None:
    encoder = getattr(text_encoder, "text_model", text_encoder).encoder  # a level less from transformers 5 on
    layers = len(encoder.layers)
    if not 0 < skipped < layers:
        raise RequestError(f"clip skip is {skipped}; expected 0 to {layers - 1} of this text encoder")
    encoder.layers = encoder.layers[:-skipped]
    text_encoder.config.num_hidden_layers = layers - skipped
