"""A Stable Diffusion folder and a safety module to a bundle."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnx
import torch
from msgspec import structs
from torch import nn

import saferedir_torch
from saferedir.engines.bundle import file_sha256
from saferedir.engines.errors import RequestError
from saferedir.engines.json_text import check_stated
from saferedir.engines.manifest import (
    LARGEST_BATCH,
    MANIFEST_FILE,
    SCHEMA_VERSION,
    TOKENIZER_FILE,
    ConceptInfo,
    EngineInfo,
    FileInfo,
    Manifest,
    ModelInfo,
    Name,
    PrecisionInfo,
    SafetyInfo,
    drawing_engines,
)
from saferedir.engines.output_place import expect_bundle, output_place, put_in_place
from saferedir.engines.printable import printable
from saferedir.engines.step import SAFETY_ENGINES
from saferedir.engines.whole_file import write_bytes
from saferedir.export.added_words import with_words
from saferedir.export.engine_graph import Graph
from saferedir.export.families import family_of_unet
from saferedir.export.graphs import all_graphs
from saferedir.export.half import ISLANDS, PARTS, PRECISIONS, halved
from saferedir.export.model_graphs import own_size
from saferedir.export.onnx_export import BF16_OPSET, OPSET, tensor_infos, to_onnx
from saferedir.export.room import check_disk, check_memory
from saferedir.export.scheduler_config import scheduler_info
from saferedir.export.unfinished import unfinished
from saferedir.export.weights import WeightFile, externalise
from saferedir_torch.config import SafetyConfig
from saferedir_torch.fit import check_match, encoder_hashes
from saferedir_torch.safety_module import SafetyModule, parameters_sha256

#: How weights are stored, what the model computes in, and how far it may lie from its reference in fp32.
PRECISION_INFOS = {
    "fp32": PrecisionInfo(storage="float16", compute="float32"),
    "fp16": PrecisionInfo(storage="float16", compute="float16", tolerance=2e-2, decisions=0.999, psnr=40.0),
    "bf16": PrecisionInfo(storage="bfloat16", compute="bfloat16", tolerance=2e-1, decisions=0.999, psnr=40.0),
}
MAKERS = ("saferedir", "torch", "diffusers", "transformers", "onnx", "onnxscript")
#: About what graphs and tokenizer take beside the weights, in bytes.
GRAPHS = 4_000_000
#: Memory that tracing takes, in multiples of the largest part's weights: copies of them in a graph, and in the file.
MEMORY = 2


@dataclass(frozen=True, kw_only=True)
class BundleOptions:
    """What a bundle is to be."""

    name: str
    max_batch: int = 8
    #: What the model computes in; the safety computes in fp32.
    precision: str = "fp32"
    #: Files of textual inversions that are added, and the words for them where these are not their own.
    words: tuple[tuple[Path, str | None], ...] = ()
    #: Height and width in pixels of the pictures it draws besides those of the model's own size.
    further_sizes: tuple[tuple[int, int], ...] = ()
    #: Types of modules that compute in fp32 whatever the precision.
    islands: tuple[type[nn.Module], ...] = ISLANDS

    def check(self) -> None:
        """Raise `RequestError` where a value is out of range."""
        if not 1 <= self.max_batch <= LARGEST_BATCH:
            raise RequestError(f"largest batch is {self.max_batch}; expected 1 to {LARGEST_BATCH}")
        if self.precision not in PRECISIONS:
            raise RequestError(f"precision is {self.precision!r}; expected one of {', '.join(PRECISIONS)}")
        check_stated(self.name, Name, f"name {printable(self.name)[:80]!r}")


def export_bundle(
    pipeline: Any,
    safety: SafetyModule,
    out: Path,
    options: BundleOptions,
    on_engine: Callable[[str], None] | None = None,
    on_size: Callable[[int], None] | None = None,
) -> Path:
    """Export every engine and write the bundle to `out`, which is replaced as a whole when all is done.

    An export that was interrupted is taken up where it was by the next one of the same to the same place.

    `on_engine` is called at each engine's beginning, `on_size` before them all, with about as many bytes as the bundle takes.

    Raises:
        OutputError: there is too little room or memory, or `out` cannot be written.
        RequestError: an option is out of range.
        SafetyMismatchError: the safety module is made for another text encoder or other shapes.
        ExportError: a graph cannot be exported, or the scheduler's configuration is not understood.
    """
    check_match(pipeline, safety)
    # It fits, so that both name the encoder alike, whatever precision the module met it in.
    info = structs.replace(safety_info(safety.config), text_encoder_sha256=encoder_hashes(pipeline).through_fp16)
    sizes = latent_sizes(pipeline, options.further_sizes)
    return write_bundle(
        out, pipeline, lambda computing: all_graphs(computing, safety, sizes), WeightFile("safety.safetensors", safety),
        info, options, controller="saferedir", on_engine=on_engine, on_size=on_size,
    )  # fmt: skip


def write_bundle(
    out: Path,
    pipeline: Any | None,
    graphs_of: Callable[[Any], Mapping[str, Graph]],
    safety_weights: WeightFile,
    safety: SafetyInfo,
    options: BundleOptions,
    *,
    controller: str,
    on_engine: Callable[[str], None] | None,
    on_size: Callable[[int], None] | None = None,
) -> Path:
    """Write the bundle of `graphs_of` the pipeline to `out`, which is replaced as a whole where it is a bundle; without a
    pipeline that of a safety alone.

    Raises:
        RequestError: an option is out of range.
        ExportError: a graph cannot be exported, or the scheduler's configuration is not understood.
        OutputError: there is too little room or memory, or `out` is neither absent, nor empty, nor a bundle.
    """
    options.check()
    out = output_place(out, (), expect_bundle)
    added: dict[str, tuple[str, ...]] = {}
    if pipeline is not None and options.words:
        pipeline, added = with_words(pipeline, options.words)
    dtype = PRECISIONS[options.precision]
    opset = BF16_OPSET if dtype == torch.bfloat16 else OPSET
    computing = pipeline if pipeline is None or dtype == torch.float32 else halved(pipeline, dtype, options.islands)
    scheduler = None if pipeline is None else scheduler_info(pipeline.scheduler)
    sizes = () if pipeline is None else (own_size(pipeline), *latent_sizes(pipeline, options.further_sizes))
    model = None if pipeline is None else _model_info(pipeline, added, sizes[1:])
    check_stated(safety, SafetyInfo, "the safety")
    check_stated(model, ModelInfo | None, "the model")
    weights = [safety_weights]
    if computing is not None:
        parts = {"text_encoder": computing.text_encoder, "unet": computing.unet, "vae": computing.vae}
        weights = [*(WeightFile(f"{part}.safetensors", module) for part, module in parts.items()), safety_weights]
    size = GRAPHS + sum(file.size for file in weights)
    check_disk(out, size, f"the bundle {out.name}")
    if computing is not None:
        largest = max(sum(own.nbytes for own in getattr(computing, part).parameters()) for part in PARTS)
        check_memory(MEMORY * largest, f"exporting {options.name}")
    if on_size is not None:
        on_size(size)
    key = _key(computing, weights, replace(options, words=()), safety, added, controller)
    with unfinished(out, key) as folder:
        names = drawing_engines(sizes) if sizes else SAFETY_ENGINES
        engines = _write_engines(names, graphs_of(computing), weights, folder, opset, on_engine)
        if pipeline is not None:
            _write_tokenizer(pipeline.tokenizer, folder)
        manifest = Manifest(
            schema_version=SCHEMA_VERSION,
            name=options.name,
            model_family="" if pipeline is None else family_of_unet(pipeline.unet.config).name,
            controller=controller,
            max_batch=options.max_batch,
            model=model,
            scheduler=scheduler,
            safety=safety,
            precision=PRECISION_INFOS[options.precision],
            made_with={maker: version(maker) for maker in MAKERS},
            engines=engines,
            files={
                path.name: FileInfo(file_sha256(path), path.stat().st_size)
                for path in sorted(folder.iterdir())
                if path.name != MANIFEST_FILE
            },
        )
        (folder / MANIFEST_FILE).write_bytes(manifest.to_json())
        put_in_place(folder, out)
    return out


def _key(
    pipeline: Any | None, weights: Sequence[WeightFile], options: BundleOptions, safety: SafetyInfo,
    added: Mapping[str, tuple[str, ...]], controller: str,
) -> str:  # fmt: skip
    """A hash of everything that the graphs depend on, the code that makes them included."""
    digest = hashlib.sha256()
    parts = () if pipeline is None else (pipeline.text_encoder, pipeline.unet, pipeline.vae, pipeline.scheduler)
    configs = [str(part.config) for part in parts if hasattr(part, "config")]
    made_with = {maker: version(maker) for maker in MAKERS}
    digest.update(repr((configs, options, safety, added, controller, made_with)).encode())
    for file in weights:
        digest.update(file.sha256.encode())
    for code in sorted((*Path(__file__).parent.glob("*.py"), *Path(saferedir_torch.__file__).parent.glob("*.py"))):
        digest.update(code.read_bytes())
    return digest.hexdigest()


def latent_sizes(pipeline: Any, pictures: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Height and width of the latents of `pictures`, without the model's own and without repetitions.

    Raises:
        RequestError: a side is no multiple of what a latent pixel covers.
    """
    scale, (own, _) = _scale_factor(pipeline), own_size(pipeline)
    step = scale * pipeline.unet.config.get("patch_size", 1)
    for height, width in pictures:
        if min(height, width) < 1 or height % step or width % step:
            raise RequestError(
                f"size is {height}x{width}; expected multiples of {step}, such as {own * scale}x{own * scale + 8 * step}"
            )
    latents = dict.fromkeys((height // scale, width // scale) for height, width in pictures)
    return tuple(size for size in latents if size != (own, own))


def _scale_factor(pipeline: Any) -> int:
    """How many pixels of a picture a pixel of the latent covers in each direction."""
    return int(2 ** (len(pipeline.vae.config.block_out_channels) - 1))


def _write_engines(
    names: Sequence[str],
    graphs: Mapping[str, Graph],
    files: Sequence[WeightFile],
    folder: Path,
    opset: int,
    on_engine: Callable[[str], None] | None,
) -> dict[str, EngineInfo]:
    engines: dict[str, EngineInfo] = {}
    models: dict[str, Any] = {}
    for name in graphs:
        if name not in names:  # a part, whose weights are found once for all engines that it is written into
            externalise(to_onnx(name, graphs, models, opset), files)
            continue
        if on_engine is not None:
            on_engine(name)
        path = folder / f"{name}.onnx"
        if path.exists():  # by an export that was interrupted
            models[name] = onnx.load(str(path), load_external_data=False)
        model = to_onnx(name, graphs, models, opset)
        used = externalise(model, files)
        if not path.exists():
            write_bytes(path, model.SerializeToString(deterministic=True))
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


def _model_info(
    pipeline: Any, added_words: dict[str, tuple[str, ...]], further_sizes: tuple[tuple[int, int], ...]
) -> ModelInfo:
    unet, vae = pipeline.unet.config, pipeline.vae.config
    height, width = own_size(pipeline)
    return ModelInfo(
        latent_channels=unet.in_channels,
        latent_height=height,
        latent_width=width,
        prompt_tokens=pipeline.tokenizer.model_max_length,
        prompt_width=unet.cross_attention_dim,
        vae_scale_factor=_scale_factor(pipeline),
        vae_scaling_factor=vae.scaling_factor,
        prediction_type=pipeline.scheduler.config.prediction_type,
        text_encoder_sha256=encoder_hashes(pipeline).through_fp16,
        unet_sha256=parameters_sha256(pipeline.unet),
        told_guidance=bool(unet.get("time_cond_proj_dim")),
        added_words=added_words,
        further_sizes=further_sizes,
    )


def safety_info(config: SafetyConfig) -> SafetyInfo:
    """What the manifest says of a safety module with this configuration."""
    return SafetyInfo(
        text_encoder_sha256=config.text_encoder_sha256,
        unet_sha256=config.unet_sha256,
        prompt_tokens=config.streams[0].tokens,
        prompt_width=config.streams[0].width,
        latent_channels=config.latent_channels,
        cooldown=config.cooldown,
        concepts=tuple(ConceptInfo(concept.name, concept.replacement, concept.threshold, None) for concept in config.concepts),
        promise=config.promise,
    )
