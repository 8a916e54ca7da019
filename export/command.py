"""The `export` command's work, with every failure a typed error of the product."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from saferedir.engines.errors import BundleError, OutputError, RequestError, SafetyMismatchError
from saferedir.engines.manifest import REQUIRED_ENGINES
from saferedir.export.bundle_export import export_bundle
from saferedir.export.onnx_export import ExportError
from saferedir_torch import protect
from saferedir_torch.config import SafetyConfigError
from saferedir_torch.models import load_pipeline
from saferedir_torch.safety_module import SafetyModule


def export_folder(
    model: Path, safety: Path, out: Path, *, name: str, max_batch: int, on_step: Callable[[int, int], None]
) -> Path:
    """Export the pipeline in `model`, protected by the module in `safety`, to the bundle folder `out`.

    Raises:
        RequestError: a folder is missing or is not what it should be.
        SafetyMismatchError: the module was made for another model.
        BundleError: a graph cannot be exported.
        OutputError: `out` cannot be written.
    """
    done, engines = 0, len(REQUIRED_ENGINES)

    def count(_: str) -> None:
        nonlocal done
        on_step(done, engines)
        done += 1

    if not (model / "model_index.json").is_file():
        raise RequestError(f"{model} holds no model_index.json; expected a diffusers folder of Stable Diffusion 1.x")
    try:
        module = SafetyModule.load(safety)
    except SafetyConfigError as error:
        raise RequestError(str(error)) from error
    try:
        pipeline = load_pipeline(model)
    except Exception as error:  # diffusers, transformers and safetensors raise several types of their own
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise RequestError(f"{model} cannot be opened as a diffusers pipeline: {reason}") from error
    try:
        export_bundle(pipeline, module, out, name=name, max_batch=max_batch, on_engine=count)
    except protect.SafetyMismatchError as error:
        raise SafetyMismatchError(str(error)) from error
    except ExportError as error:
        raise BundleError(str(error)) from error
    except OSError as error:
        raise OutputError(f"{out} cannot be written: {error}") from error
    on_step(engines, engines)
    return out
