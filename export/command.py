"""What the commands `export` and `import-published` do, with every failure a typed error of the product."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

from diffusers import StableDiffusionPipeline

from saferedir.engines.errors import OutputError, RequestError
from saferedir.engines.output_place import expect_bundle, output_place, refuse_overlap
from saferedir.engines.step import DRAWING_ENGINES, SAFETY_ENGINES, SIZED_ENGINES
from saferedir.export.added_words import with_words
from saferedir.export.bundle_export import BundleOptions, export_bundle, latent_sizes
from saferedir.export.families import checked_unet, family_of
from saferedir.export.model_changes import ModelChanges, change
from saferedir.export.published_import import PublishedOptions, import_published
from saferedir.export.scheduler_config import replacement
from saferedir_torch.model_source import bundled_words, locate
from saferedir_torch.models import load_pipeline
from saferedir_torch.published_checkpoint import load_published
from saferedir_torch.safety_module import SafetyModule

#: Marks a folder as written by `--save-model`, which alone writes it again.
SAVED = ".saved-by-saferedir"


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
    on_note: Callable[[str], None] | None = None,
) -> Path:
    """Export the pipeline in `model`, protected by the module in `safety`, to the bundle folder `out`.

    `model` is a diffusers folder, a hub name or one `.safetensors` file, whose configuration is that of `config`.
    With `save_model` the pipeline as exported is written to that folder as well, for training and verification. `on_note` is
    told what is not as the model's folder has it.

    Raises:
        RequestError: a folder is missing or is not what it should be, or an option is out of range.
        SafetyMismatchError: the module was made for another model.
        BundleError: a graph cannot be exported.
        OutputError: `out` or `save_model` cannot be written or holds what is not ours or read, or there is too little room or
            memory.
    """
    with _typed_errors(out):
        options.check()
        changes = changes or ModelChanges()
        inputs = (
            model,
            safety,
            config,
            changes.vae,
            *(path for path, _ in changes.loras),
            *(path for path, _ in options.words),
        )
        place = output_place(out, inputs, expect_bundle)
        if save_model is not None:
            refuse_overlap(save_model, save_model.resolve(), place, "--save-model")
            save_model = output_place(save_model, inputs, _expect_saved, "--save-model")
        module = SafetyModule.load(safety)
        note = on_note or (lambda _: None)
        pipeline = _open(model, config, without_vae=changes.vae is not None)
        _say_replacement(pipeline, note)
        if words := bundled_words(model):
            note(f"{model} brings embeddings along, which are not added: {', '.join(words)}; name their files to add them")
        pipeline = change(pipeline, changes, note)
        if save_model is not None and not isinstance(pipeline, StableDiffusionPipeline):
            raise RequestError(f"--save-model writes Stable Diffusion pipelines alone; {model} is of another family")
        if save_model is not None:
            saved, _ = with_words(pipeline, options.words)
            save_model.mkdir(parents=True, exist_ok=True)
            (save_model / SAVED).touch()
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
    on_note: Callable[[str], None] | None = None,
) -> Path:
    """Make a bundle of a published checkpoint in compatibility mode, with the pipeline in `model` or of the safety alone.

    Raises:
        RequestError: the checkpoint is damaged or of another layout, the model is no pipeline, or an option is impossible.
        SafetyMismatchError: the checkpoint is made for another width, number of tokens or latent channels.
        BundleError: a graph cannot be exported.
        OutputError: `out` cannot be written, or holds what is not ours or read.
    """
    engines = len(DRAWING_ENGINES if model else SAFETY_ENGINES)
    with _typed_errors(out):
        options.check()
        bundle.check()
        output_place(out, (checkpoint, model), expect_bundle)
        network = load_published(checkpoint)
        pipeline = None if model is None else _open(model)
        if pipeline is not None:
            _say_replacement(pipeline, on_note or (lambda _: None))
        import_published(network, out, options, bundle, pipeline=pipeline, on_engine=_counter(on_step, engines))
    on_step(engines, engines)
    return out


def _expect_saved(place: Path) -> None:
    if not (place / SAVED).exists():
        raise OutputError(
            f"{place} is neither empty nor written by --save-model before, and is left as it is; name a new folder"
        )


def _counter(on_step: Callable[[int, int], None], engines: int) -> Callable[[str], None]:
    """Calls `on_step(engines begun before, engines)` at each engine's beginning."""
    begun = count()
    return lambda _: on_step(next(begun), engines)


def _say_replacement(pipeline: Any, on_note: Callable[[str], None]) -> None:
    """Say where another sampler stands in for the model's own, or raise where its scheduler is not understood."""
    if note := replacement(pipeline.scheduler):
        on_note(note)


def _open(model: Path, config: str | None = None, *, without_vae: bool = False) -> Any:
    try:
        place = locate(model)
        if place.is_dir():
            family_of(place)
        pipeline = load_pipeline(place, config, without_vae=without_vae)
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
