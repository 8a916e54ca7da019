"""What the commands `export` and `import-published` do, with every failure a typed error of the product."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

from diffusers import StableDiffusionPipeline

from saferedir.engines.errors import OutputError, RequestError
from saferedir.engines.step import DRAWING_ENGINES, SAFETY_ENGINES, SIZED_ENGINES
from saferedir.export.bundle_export import BundleOptions, export_bundle, latent_sizes
from saferedir.export.families import checked_unet, family_of
from saferedir.export.model_changes import ModelChanges, change, with_words
from saferedir.export.published_import import PublishedOptions, import_published
from saferedir_torch.model_source import locate
from saferedir_torch.models import load_pipeline
from saferedir_torch.published_checkpoint import load_published
from saferedir_torch.safety_module import SafetyModule


def export_folder(
    model: Path,
    safety: Path,
    out: Path,
    options: BundleOptions,
    changes: ModelChanges | None = None,
    *,
    config: str | None = None,
    save_model: Path | None = None,
    on_step: Callable[[int, int], None],
    on_size: Callable[[int], None] | None = None,
) -> Path:
    """Export the pipeline in `model`, protected by the module in `safety`, to the bundle folder `out`.

    `model` is a diffusers folder, a hub name or one `.safetensors` file, whose configuration is that of `config`.
    With `save_model` the pipeline as exported is written to that folder as well, for training and verification.

    Raises:
        RequestError: a folder is missing or is not what it should be, or an option is out of range.
        SafetyMismatchError: the module was made for another model.
        BundleError: a graph cannot be exported.
        OutputError: `out` cannot be written, or there is too little room or memory.
    """
    with _typed_errors(out):
        module = SafetyModule.load(safety)
        pipeline = change(_open(model, config), changes or ModelChanges())
        if save_model is not None and not isinstance(pipeline, StableDiffusionPipeline):
            raise RequestError(f"--save-model writes Stable Diffusion pipelines alone; {model} is of another family")
        if save_model is not None:
            saved, _ = with_words(pipeline, options.words)
            saved.save_pretrained(save_model)
        sizes = latent_sizes(pipeline, options.further_sizes)
        engines = len(DRAWING_ENGINES) + len(sizes) * len(SIZED_ENGINES)
        export_bundle(pipeline, module, out, options, _counter(on_step, engines), on_size)
    on_step(engines, engines)
    return out


def import_checkpoint(
    checkpoint: Path,
    out: Path,
    options: PublishedOptions,
    bundle: BundleOptions,
    *,
    model: Path | None,
    on_step: Callable[[int, int], None],
) -> Path:
    """Make a bundle of a published checkpoint in compatibility mode, with the pipeline in `model` or of the safety alone.

    Raises:
        RequestError: the checkpoint is damaged or of another layout, the model is no pipeline, or an option is impossible.
        SafetyMismatchError: the checkpoint is made for another width, number of tokens or latent channels.
        BundleError: a graph cannot be exported.
        OutputError: `out` cannot be written.
    """
    engines = len(DRAWING_ENGINES if model else SAFETY_ENGINES)
    with _typed_errors(out):
        network = load_published(checkpoint)
        pipeline = None if model is None else _open(model)
        import_published(network, out, options, bundle, pipeline=pipeline, on_engine=_counter(on_step, engines))
    on_step(engines, engines)
    return out


def _counter(on_step: Callable[[int, int], None], engines: int) -> Callable[[str], None]:
    """Calls `on_step(engines begun before, engines)` at each engine's beginning."""
    begun = count()
    return lambda _: on_step(next(begun), engines)


def _open(model: Path, config: str | None = None) -> Any:
    try:
        place = locate(model)
        if place.is_dir():
            family_of(place)
        pipeline = load_pipeline(place, config)
        checked_unet(pipeline.unet.config, model)
        return pipeline
    except RequestError:
        raise
    except Exception as error:  # diffusers, transformers and safetensors raise several types of their own
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise RequestError(f"{model} cannot be opened as a diffusers pipeline: {reason}") from error


@contextmanager
def _typed_errors(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(f"{out} cannot be written: {error}") from error
