"""LoRAs are added to a model's weights by this module alone, so that what a file says is what is added.

A LoRA changes the weight W of a layer by (alpha / rank) up down (Hu et al. 2021, section 4.1). Its layers are named as
diffusers, PEFT or kohya-ss name them, which differ in prefixes, dots and underscores. A tensor that belongs to no layer, or is
more than a LoRA, is refused: half a LoRA is another one.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from saferedir.engines.errors import RequestError
from saferedir.export.tensor_files import check_numbers, read_metadata, read_tensors

#: What a tensor is, by how its name ends: of kohya-ss, of PEFT, and of diffusers' newer and older format.
ROLES = {
    "down": re.compile(r"(.+?)[._](?:lora_down|lora_A(?:\.[^.]+)?|lora\.down|lora_linear_layer\.down)\.weight"),
    "up": re.compile(r"(.+?)[._](?:lora_up|lora_B(?:\.[^.]+)?|lora\.up|lora_linear_layer\.up)\.weight"),
    "alpha": re.compile(r"(.+?)(?:[._](?:lora|lora_linear_layer))?\.alpha"),
}
#: What else a file may hold, by what is found in a tensor's name.
OTHERS = {
    r"dora_scale|lora_magnitude_vector": "DoRA",
    r"\.hada_": "LoHa",
    r"\.lokr_": "LoKr",
    r"\.oft_": "OFT",
    r"\.lora_mid": "a LoRA in Tucker's form",
    r"\.lora_embedding_": "a LoRA of embeddings",
    r"vera_lambda": "VeRA",
    r"\.ia3_|\.on_input$": "IA3",
    r"\.diff(_b)?$": "full differences of weights",
    r"lora.*\.bias$": "a LoRA with biases",
}
#: Models whose layers are called so.
FAMILIES = {
    "lora_te2_": "Stable Diffusion XL",
    "text_encoder_2": "Stable Diffusion XL",
    "input_blocks": "Stable Diffusion XL",
    "double_blocks": "Flux",
    "single_transformer_blocks": "Flux",
}
#: Which part of the model a name is of, by how it begins, in the order in which it is tried.
PREFIXES = (
    ("lora_unet_", ("unet",)), ("lora_te1_", ("text_encoder",)), ("lora_te_", ("text_encoder",)),
    ("base_model.model.unet.", ("unet",)), ("base_model.model.text_encoder.", ("text_encoder",)),
    ("base_model.model.", ("unet", "text_encoder")), ("unet.", ("unet",)), ("text_encoder.", ("text_encoder",)),
    ("", ("unet", "text_encoder")),
)  # fmt: skip
#: diffusers' older names of projections -> those of the layers, in either part.
OLDER = {"to_out": "to_out_0"}
OLDER_TEXT = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}
#: Entries of PEFT's configuration that do not change what its tensors mean.
WITHOUT_INFLUENCE = (
    "auto_mapping", "base_model_name_or_path", "exclude_modules", "inference_mode", "layers_pattern", "layers_to_transform",
    "lora_dropout", "megatron_core", "peft_version", "qalora_group_size", "revision", "runtime_config", "target_modules",
    "task_type",
)  # fmt: skip
KNOWN_INITS = (True, False, None, "gaussian", "eva", "orthogonal")


@dataclass
class LoraLayer:
    """What a file says of one layer."""

    name: str
    module: nn.Linear | nn.Conv2d
    parts: dict[str, Tensor] = field(default_factory=dict)

    @property
    def rank(self) -> int:
        """Of up and down, once they are known to fit.

        Raises:
            ValueError: a part is missing, or they do not make a weight of this layer.
        """
        if missing := {"up", "down"} - self.parts.keys():
            raise ValueError(f"{self.name} has no {' and no '.join(sorted(missing))}")
        up, down = (tuple(self.parts[role].shape) for role in ("up", "down"))
        whole = tuple(self.module.weight.shape)
        fits = min(len(up), len(down)) > 1 and up[1] == down[0] > 0
        # Convolutions of one pixel are written as matrices by some and as convolutions by others.
        if not (fits and _flat(up) == (whole[0], up[1]) and _flat(down)[1:] == _flat(whole)[1:]):
            raise ValueError(f"{self.name} has shape {whole}, its up and down are {up} and {down}")
        return down[0]

    def delta(self, scale: float | None) -> Tensor:
        """What its weight changes by, of the weight's shape, in fp64; `scale` is alpha / rank where the file has no alpha.

        Raises:
            ValueError: the layer's alpha is no number.
        """
        if (alpha := self.parts.get("alpha")) is not None:
            if alpha.numel() != 1:
                raise ValueError(f"{self.name} has an alpha of shape {tuple(alpha.shape)}; expected one number")
            scale = float(alpha) / self.rank
        up, down = self.parts["up"].double().flatten(1), self.parts["down"].double().flatten(1)
        return (1.0 if scale is None else scale) * (up @ down).reshape(self.module.weight.shape)


def fuse_lora(pipeline: Any, path: Path, scale: float) -> str:
    """Add `scale` times the LoRA in `path` to the weights of UNet and text encoder, in place. Returns what was done, in words.

    Raises:
        RequestError: the file is damaged, holds something else or more than a LoRA, or is made for another model. Nothing was
            changed then.
    """
    if not math.isfinite(scale):
        raise RequestError(f"{path} is to be added {scale} times; expected a finite scale")
    tensors = read_tensors(path, "LoRA")
    _check_kind(path, tensors)
    check_numbers(tensors, path)
    layers = _layers(path, tensors, pipeline)
    alphas = _Alphas.of(path, tensors)
    deltas = {}
    for key, layer in layers.items():
        try:
            deltas[key] = scale * layer.delta(alphas.scale(key[0], layer))
            if not deltas[key].float().isfinite().all():
                raise ValueError(f"what {layer.name} changes by is not finite")
        except (ValueError, TypeError, AttributeError, re.error) as error:  # of what a configuration says, the latter ones
            raise RequestError(f"{path} cannot be used as a LoRA here: {error}") from error
    with torch.no_grad():
        for key, delta in deltas.items():
            weight = layers[key].module.weight
            weight.copy_(weight.double() + delta)
    counts = {part: sum(key[0] == part for key in layers) for part in ("unet", "text_encoder")}
    return (
        f"{path}: added {scale:g} times to {counts['unet']} layers of the UNet and {counts['text_encoder']} of the text encoder"
    )


def _check_kind(path: Path, tensors: Mapping[str, Any]) -> None:
    for mark, kind in OTHERS.items():
        if any(re.search(mark, str(name)) for name in tensors):
            raise RequestError(
                f"{path} holds {kind}, which is not known here; expected a LoRA, of which each layer has an up and a down"
            )
    if not tensors:
        raise RequestError(f"{path} is empty; expected a LoRA")


def _layers(path: Path, tensors: Mapping[str, Tensor], pipeline: Any) -> dict[tuple[str, str], LoraLayer]:
    """Part and name -> the layers that a file is about, with every tensor of the file in one of them."""
    modules = {part: _modules(getattr(pipeline, part)) for part in ("unet", "text_encoder")}
    layers: dict[tuple[str, str], LoraLayer] = {}
    strange = []
    for name, tensor in tensors.items():
        found = next(((role, match[1]) for role, rule in ROLES.items() if (match := rule.fullmatch(str(name)))), None)
        key = None if found is None else _find(found[1], modules)
        if found is None or key is None:
            strange.append(str(name))
            continue
        part, normal = key
        layer = layers.setdefault(key, LoraLayer(*modules[part][normal]))
        if found[0] in layer.parts:
            raise RequestError(f"{path} holds two tensors for {found[0]} of {part}.{layer.name}, one of them {name}")
        layer.parts[found[0]] = tensor
    if strange:
        family = next(
            (f", but are named as those of {family}" for mark, family in FAMILIES.items() if mark in " ".join(strange)), ""
        )
        raise RequestError(
            f"{path} cannot be used as a LoRA here: {len(strange)} of {len(tensors)} tensors belong to no layer of this model"
            f"{family}, such as {strange[0][:100]}"
        )
    return layers


def _modules(model: nn.Module) -> dict[str, tuple[str, Any]]:
    """Linear and convolutional layers by their names, without what differs between the rules for naming them."""
    kinds = (nn.Linear, nn.Conv2d)
    return {_normal(name): (name, module) for name, module in model.named_modules() if isinstance(module, kinds)}


def _normal(name: str) -> str:
    return name.replace(".processor.", ".").replace(".", "_").removeprefix("text_model_")


def _flat(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape without a kernel of one pixel."""
    return shape[:2] if all(size == 1 for size in shape[2:]) else shape


def _find(name: str, modules: Mapping[str, Mapping[str, Any]]) -> tuple[str, str] | None:
    """The part and the name of the layer that a file calls `name`; None where there is none."""
    prefix, parts = next((prefix, parts) for prefix, parts in PREFIXES if name.startswith(prefix))
    normal = _normal(name.removeprefix(prefix))
    for part in parts:
        older = OLDER if part == "unet" else OLDER_TEXT
        renamed = [normal.removesuffix(old) + new for old, new in older.items() if normal.endswith(f"_{old}")]
        for candidate in (normal, *renamed):
            if candidate in modules[part]:
                return part, candidate
    return None


@dataclass(frozen=True)
class _Alphas:
    """What is said of alpha outside the tensors: PEFT's configuration for each part; nothing means alpha is the rank."""

    configs: dict[str, dict[str, Any]]

    @classmethod
    def of(cls, path: Path, tensors: Mapping[str, Tensor]) -> _Alphas:
        """Of the file's metadata, where diffusers writes it, or of the file beside it, where PEFT does."""
        stated = any(name.endswith(".alpha") for name in tensors)
        beside = path.with_name("adapter_config.json")
        try:
            if packed := read_metadata(path).get("lora_adapter_metadata"):
                raw = json.loads(packed)
                configs = {
                    part: {key.removeprefix(f"{part}."): value for key, value in raw.items() if key.startswith(f"{part}.")}
                    for part in ("unet", "text_encoder")
                }
            elif any(name.startswith("base_model.model.") for name in tensors) and not stated:
                configs = dict.fromkeys(("unet", "text_encoder"), json.loads(beside.read_text(encoding="utf-8")))
            else:
                return cls({})
            for config in configs.values():
                _check_config(path, config)
        except (OSError, ValueError, AttributeError, TypeError, RecursionError) as error:
            raise RequestError(f"{path} does not say its alpha, nor does {beside}, which PEFT writes: {error}") from error
        if stated:
            raise RequestError(f"{path} says alpha twice, in its tensors and in its metadata; leave one out")
        return cls(configs)

    def scale(self, part: str, layer: LoraLayer) -> float | None:
        """alpha / rank of a layer, as PEFT has it; None where nothing is said."""
        rank = layer.rank
        if not self.configs:
            return None
        if not (config := self.configs[part]):
            raise ValueError(f"its metadata says nothing of the {part.replace('_', ' ')}")
        names = (layer.name, f"text_model.{layer.name}")
        own = [
            value
            for key, value in (config.get("alpha_pattern") or {}).items()
            if any(re.match(rf"(.*\.)?({key})$", name) for name in names)
        ]
        alpha = float(own[0] if own else config.get("lora_alpha", 8))
        return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _check_config(path: Path, config: Mapping[str, Any]) -> None:
    """Raise `RequestError` where PEFT's configuration asks for more than a plain LoRA."""
    used = ("r", "lora_alpha", "alpha_pattern", "rank_pattern", "use_rslora", *WITHOUT_INFLUENCE)
    for key, value in config.items():
        usual = {"bias": "none", "peft_type": "LORA"}.get(key)
        known = value in KNOWN_INITS if key == "init_lora_weights" else value == usual or not value
        if key not in used and not known:
            raise RequestError(f"{path} is a LoRA with {key} {str(value)[:60]!r}, which is not known here")
