"""A Stable Diffusion folder and a safety module to a bundle."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnx

from saferedir.engines.bundle import file_sha256
from saferedir.engines.manifest import (
    MANIFEST_FILE,
    SCHEMA_VERSION,
    TOKENIZER_FILE,
    ConceptInfo,
    EngineInfo,
    FileInfo,
    Manifest,
    ModelInfo,
    PrecisionInfo,
    PromiseInfo,
    SafetyInfo,
    SchedulerInfo,
)
from saferedir.export.families import family_of_width
from saferedir.export.graphs import Graph, all_graphs
from saferedir.export.onnx_export import ExportError, tensor_infos, to_onnx
from saferedir.export.weights import WeightFile, externalise
from saferedir_torch.config import SafetyConfig
from saferedir_torch.protect import check_match
from saferedir_torch.safety_module import SafetyModule, parameters_sha256

#: diffusers' samplers that the runtime has.
SAMPLERS = {"DDIMScheduler": "ddim", "EulerDiscreteScheduler": "euler", "LCMScheduler": "lcm"}
UNKNOWN_SPACINGS = (
    "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas", "use_flow_sigmas",
    "rescale_betas_zero_snr",
)  # fmt: skip
MAKERS = ("saferedir", "torch", "diffusers", "transformers", "onnx", "onnxscript")


def export_bundle(
    pipeline: Any,
    safety: SafetyModule,
    out: Path,
    *,
    name: str,
    max_batch: int = 8,
    on_engine: Callable[[str], None] | None = None,
) -> Path:
    """Export every engine and write the bundle to `out`, which is replaced as a whole when all is done.

    Raises:
        SafetyMismatchError: the safety module is made for another text encoder or other shapes.
        ExportError: a graph cannot be exported, or the scheduler clips or thresholds.
    """
    check_match(pipeline, safety)
    return write_bundle(
        out, pipeline, all_graphs(pipeline, safety), WeightFile("safety.safetensors", safety), safety_info(safety.config),
        controller="saferedir", name=name, max_batch=max_batch, on_engine=on_engine,
    )  # fmt: skip


def write_bundle(
    out: Path,
    pipeline: Any | None,
    graphs: Mapping[str, Graph],
    safety_weights: WeightFile,
    safety: SafetyInfo,
    *,
    controller: str,
    name: str,
    max_batch: int,
    on_engine: Callable[[str], None] | None,
) -> Path:
    """Write the bundle of these graphs to `out`, which is replaced as a whole; without `pipeline`, of a safety alone.

    Raises:
        ExportError: a graph cannot be exported, or the scheduler clips or thresholds.
    """
    scheduler = None if pipeline is None else scheduler_info(pipeline.scheduler)
    weights = [safety_weights]
    if pipeline is not None:
        parts = {"text_encoder": pipeline.text_encoder, "unet": pipeline.unet, "vae": pipeline.vae}
        weights = [*(WeightFile(f"{part}.safetensors", module) for part, module in parts.items()), safety_weights]
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        engines = _write_engines(graphs, weights, folder, on_engine)
        if pipeline is not None:
            _write_tokenizer(pipeline.tokenizer, folder)
        manifest = Manifest(
            schema_version=SCHEMA_VERSION,
            name=name,
            model_family="" if pipeline is None else family_of_width(pipeline.unet.config.cross_attention_dim).name,
            controller=controller,
            max_batch=max_batch,
            model=None if pipeline is None else _model_info(pipeline),
            scheduler=scheduler,
            safety=safety,
            precision=PrecisionInfo(storage="float16", compute="float32"),
            made_with={maker: version(maker) for maker in MAKERS},
            engines=engines,
            files={
                path.name: FileInfo(file_sha256(path), path.stat().st_size)
                for path in sorted(folder.iterdir())
                if path.name != MANIFEST_FILE
            },
        )
        (folder / MANIFEST_FILE).write_text(manifest.to_json(), encoding="utf-8")
        _replace(folder, out)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return out


def scheduler_info(scheduler: Any) -> SchedulerInfo:
    """The scheduler's configuration in the bundle's terms. Samplers that are not known here are replaced by DDIM.

    Raises:
        ExportError: it clips or thresholds, which no linear step can do, or spaces its noise levels in an unknown way.
    """
    config = scheduler.config
    if config.get("clip_sample") or config.get("thresholding"):
        raise ExportError("the scheduler clips or thresholds its samples; set clip_sample and thresholding to false")
    if odd := [name for name in UNKNOWN_SPACINGS if config.get(name)]:
        raise ExportError(f"the scheduler has {', '.join(odd)} set, which is not known here; set it to false")
    return SchedulerInfo(
        kind=SAMPLERS.get(type(scheduler).__name__, "ddim"),
        num_train_timesteps=config["num_train_timesteps"],
        beta_start=config["beta_start"],
        beta_end=config["beta_end"],
        beta_schedule=config["beta_schedule"],
        timestep_spacing=config.get("timestep_spacing", "leading"),
        steps_offset=config.get("steps_offset", 0),
        set_alpha_to_one=config.get("set_alpha_to_one", True),
        original_inference_steps=config.get("original_inference_steps", 50),
        timestep_scaling=config.get("timestep_scaling", 10.0),
    )


def _write_engines(
    graphs: Mapping[str, Graph], files: Sequence[WeightFile], folder: Path, on_engine: Callable[[str], None] | None
) -> dict[str, EngineInfo]:
    engines = {}
    for name, graph in graphs.items():
        if on_engine is not None:
            on_engine(name)
        model = to_onnx(name, graph)
        used = externalise(model, files)
        path = folder / f"{name}.onnx"
        path.write_bytes(model.SerializeToString(deterministic=True))
        engines[name] = EngineInfo(path.name, tuple(used), tensor_infos(model.graph.input), tensor_infos(model.graph.output))
    for file in files:
        file.write(folder)
    for engine in engines.values():
        onnx.checker.check_model(str(folder / engine.file), full_check=True)
    return engines


def _write_tokenizer(tokenizer: Any, folder: Path) -> None:
    """The tokenizer with its padding, which differs between families."""
    backend, length = tokenizer.backend_tokenizer, tokenizer.model_max_length
    backend.enable_truncation(length)
    backend.enable_padding(length=length, pad_id=tokenizer.pad_token_id, pad_token=tokenizer.pad_token)
    backend.save(str(folder / TOKENIZER_FILE))


def _model_info(pipeline: Any) -> ModelInfo:
    unet, vae = pipeline.unet.config, pipeline.vae.config
    size = unet.sample_size
    return ModelInfo(
        latent_channels=unet.in_channels,
        latent_height=size,
        latent_width=size,
        prompt_tokens=pipeline.tokenizer.model_max_length,
        prompt_width=unet.cross_attention_dim,
        vae_scale_factor=2 ** (len(vae.block_out_channels) - 1),
        vae_scaling_factor=vae.scaling_factor,
        prediction_type=pipeline.scheduler.config.prediction_type,
        text_encoder_sha256=parameters_sha256(pipeline.text_encoder),
        unet_sha256=parameters_sha256(pipeline.unet),
    )


def safety_info(config: SafetyConfig) -> SafetyInfo:
    """What the manifest says of a safety module with this configuration."""
    return SafetyInfo(
        text_encoder_sha256=config.text_encoder_sha256,
        unet_sha256=config.unet_sha256,
        prompt_width=config.prompt_width,
        latent_channels=config.latent_channels,
        cooldown=config.cooldown,
        concepts=tuple(
            ConceptInfo(concept.name, concept.replacement, concept.threshold, concept.alpha_scale)
            for concept in config.concepts
        ),
        promise=PromiseInfo(**asdict(config.promise)) if config.promise else None,
    )


def _replace(folder: Path, out: Path) -> None:
    """Put the finished folder in place of what was there."""
    folder.chmod(0o755)
    if out.exists():
        old = out.with_name(f".{out.name}-old")
        shutil.rmtree(old, ignore_errors=True)
        os.replace(out, old)
        os.replace(folder, out)
        shutil.rmtree(old)
    else:
        os.replace(folder, out)
