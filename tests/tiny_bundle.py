"""A bundle that draws, of graphs of a few nodes: everything a bundle has, opened and drawn in milliseconds."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from msgspec import structs
from onnx import TensorProto, helper
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from saferedir.engines.manifest import (
    MANIFEST_FILE,
    SCHEMA_VERSION,
    ConceptInfo,
    EngineInfo,
    FileInfo,
    Manifest,
    ModelInfo,
    PrecisionInfo,
    Promise,
    SafetyInfo,
    SchedulerInfo,
)

TOKENS, WIDTH, SIDE, SCALE, VALUES = 6, 5, 4, 2, 512
MODEL = ModelInfo(
    latent_channels=4, latent_height=SIDE, latent_width=SIDE, prompt_tokens=TOKENS, prompt_width=WIDTH,
    vae_scale_factor=SCALE, vae_scaling_factor=1.0, prediction_type="epsilon", text_encoder_sha256="a" * 64,
    unet_sha256="b" * 64,
)  # fmt: skip
SCHEDULER = SchedulerInfo("ddim", 1000, 0.001, 0.012, "scaled_linear", "leading", 1, False)
SAFETY = SafetyInfo(
    "a" * 64, "b" * 64, TOKENS, WIDTH, 4, cooldown=2,
    concepts=(ConceptInfo("church", "house", 0.5, None), ConceptInfo("ink", "glossy", 0.5, None)),
)  # fmt: skip
#: Engine -> its file of weights, which it takes one factor of.
WEIGHTS = {"text_encoder": "text_encoder.safetensors", "vae_decoder": "vae.safetensors", "step": "unet.safetensors"}
FACTOR = 0.9


def write_tiny_bundle(folder: Path, promise: Promise | None = None, *, sees: bool = False) -> Path:
    """The bundle in `folder`, which is made; its safety makes that `promise`, and `sees` concepts as pictures grow, or none."""
    folder.mkdir(parents=True)
    for file in WEIGHTS.values():
        (folder / file).write_bytes(np.full(VALUES, FACTOR, np.float32).tobytes())
    vocabulary = {"<|endoftext|>": 0, "[UNK]": 1, "a": 2, "church": 3, "cat": 4}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()  # type: ignore[assignment]
    tokenizer.save(str(folder / "tokenizer.json"))
    safety = structs.replace(SAFETY, promise=promise)
    manifest = _manifest({}, {}, safety)
    engines = {}
    for name in manifest.required_engines:
        weights = WEIGHTS.get(name, "unet.safetensors")
        inputs, outputs = manifest.tensors(name)
        (folder / f"{name}.onnx").write_bytes(graph(name, inputs, outputs, weights, sees=sees))
        engines[name] = EngineInfo(f"{name}.onnx", (weights,), inputs, outputs)
    files = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
    stated = {name: FileInfo(hashlib.sha256(data).hexdigest(), len(data)) for name, data in files.items()}
    (folder / MANIFEST_FILE).write_bytes(_manifest(engines, stated, safety).to_json())
    return folder


def _manifest(engines: dict[str, EngineInfo], files: dict[str, FileInfo], safety: SafetyInfo) -> Manifest:
    return Manifest(
        schema_version=SCHEMA_VERSION, name="tiny", model_family="none", controller="saferedir", max_batch=4, model=MODEL,
        scheduler=SCHEDULER, safety=safety, precision=PrecisionInfo("float32", "float32"), made_with={"saferedir": "0"},
        engines=engines, files=files,
    )  # fmt: skip


def graph(name: str, inputs: Sequence[Any], outputs: Sequence[Any], location: str, *, sees: bool = False) -> bytes:
    """An engine that multiplies by what is stored in the file `location`, as bytes of ONNX."""
    nodes = [helper.make_node("ReduceMean", ["stored"], ["factor"], keepdims=0)]
    if name == "text_encoder":
        nodes += [
            helper.make_node("Cast", ["input_ids"], ["ids"], to=TensorProto.FLOAT),
            helper.make_node("Unsqueeze", ["ids", "last"], ["column"]),
            helper.make_node("Mul", ["column", "wide"], ["embeds"]),
            helper.make_node("Mul", ["embeds", "factor"], ["prompt_embeds"]),
        ]
    elif name == "vae_decoder":
        nodes += [
            helper.make_node("Slice", ["latent", "zero", "three", "one"], ["colours"]),
            helper.make_node("Resize", ["colours", "", "scales"], ["large"], mode="nearest"),
            helper.make_node("Mul", ["large", "factor"], ["scaled"]),
            helper.make_node("Sin", ["scaled"], ["wave"]),
            helper.make_node("Sigmoid", ["wave"], ["image"]),
        ]
    else:
        nodes += [
            *_of_every_input(inputs),
            helper.make_node("Unsqueeze", ["told", "places"], ["shift"]),
            helper.make_node("Add", ["latent", "shift"], ["moved"]),
            helper.make_node("Mul", ["moved", "factor"], ["next_latent"]),
            helper.make_node("Identity", ["latent"], ["next_denoised"]),
        ]
    if "next_ok" in {tensor.name for tensor in outputs}:
        nodes += [
            helper.make_node("Identity", ["ok"], ["next_ok"]),
            helper.make_node("Mul", ["told", "small"], ["scored"]),
            helper.make_node("Add", ["scored", "offsets"], ["open"]),
            helper.make_node("Clip", ["open", "never", "always"], ["score"]),
            helper.make_node("GreaterOrEqual", ["score", "threshold"], ["reached"]),
            helper.make_node("LessOrEqual", ["cooldown", "none"], ["watching"]),
            helper.make_node("Unsqueeze", ["watching", "last"], ["looks"]),
            helper.make_node("And", ["reached", "looks"], ["fired"]),
            helper.make_node("Or", ["active", "fired"], ["next_active"]),
            helper.make_node("Cast", ["fired"], ["firings"], to=TensorProto.FLOAT),
            helper.make_node("ReduceMax", ["firings", "one"], ["any"], keepdims=1),
            helper.make_node("Unsqueeze", ["any", "last"], ["moves"]),
            helper.make_node("Add", ["prompt", "moves"], ["next_prompt"]),
            helper.make_node("Squeeze", ["any", "one"], ["once"]),
            helper.make_node("Cast", ["once"], ["rests"], to=TensorProto.BOOL),
            helper.make_node("Sub", ["cooldown", "single"], ["less"]),
            helper.make_node("Max", ["less", "none"], ["left"]),
            helper.make_node("Where", ["rests", "period", "left"], ["next_cooldown"]),
            helper.make_node("Unsqueeze", ["score", "last"], ["scores"]),
            helper.make_node("Mul", ["scores", "tokens"], ["token_mask"]),
        ]
    constants = {
        "zero": np.array([0]), "one": np.array([1]), "three": np.array([3]), "last": np.array([-1]), "places": np.array([2, 3]),
        "none": np.array([0], np.int32), "single": np.array([1], np.int32), "never": np.float32(0), "always": np.float32(1),
        "small": np.float32(0.1 if sees else 0.0), "offsets": np.array([[0.05, 0.15]], np.float32),
        "wide": np.arange(WIDTH, dtype=np.float32)[None, None] / 9, "tokens": np.ones((1, 1, TOKENS), np.float32),
        "scales": np.array([1, 1, SCALE, SCALE], np.float32),
    }  # fmt: skip
    made = helper.make_graph(
        nodes, name, [_value(tensor) for tensor in inputs], [_value(tensor) for tensor in outputs],
        [*(onnx.numpy_helper.from_array(value, key) for key, value in constants.items()), stored(location)],
    )  # fmt: skip
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    return bytes(model.SerializeToString())


def _of_every_input(inputs: Sequence[Any]) -> list[Any]:
    """`told` [B, 1]: a sum in which every input of a row has a part. By maxima, since a mean depends on the batch."""
    nodes: list[Any] = []
    total = ""
    for place, tensor in enumerate(inputs):
        name = tensor.name
        nodes += [
            helper.make_node("Cast", [name], [f"{name}_number"], to=TensorProto.FLOAT),
            helper.make_node("Flatten", [f"{name}_number"], [f"{name}_flat"], axis=1),
            helper.make_node("ReduceMax", [f"{name}_flat", "one"], [f"{name}_most"], keepdims=1),
            helper.make_node(
                "Constant", [], [f"{name}_weight"], value_float=(1e-3 if name == "timestep" else 1.0) / (7 + place)
            ),
            helper.make_node("Mul", [f"{name}_most", f"{name}_weight"], [f"{name}_part"]),
        ]
        if total:
            nodes.append(helper.make_node("Add", [total, f"{name}_part"], [f"{name}_sum"]))
        total = f"{name}_sum" if total else f"{name}_part"
    return [*nodes, helper.make_node("Identity", [total], ["told"])]


def stored(location: str) -> Any:
    """An initializer whose values lie in the file `location`."""
    tensor = TensorProto(name="stored", data_type=TensorProto.FLOAT, dims=[VALUES], data_location=TensorProto.EXTERNAL)
    for key, value in {"location": location, "offset": "0", "length": str(4 * VALUES)}.items():
        tensor.external_data.add(key=key, value=value)
    return tensor


def _value(tensor: Any) -> Any:
    kinds = {"float32": TensorProto.FLOAT, "int32": TensorProto.INT32, "bool": TensorProto.BOOL}
    return helper.make_tensor_value_info(tensor.name, kinds[tensor.dtype], list(tensor.shape))
