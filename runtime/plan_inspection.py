"""What TensorRT made of an engine: its layers and what they compute in, the shapes it takes, the memory it needs."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

#: What TensorRT calls a type of a layer's output -> its usual name. The first that is part of the text counts.
TYPES = {
    "BFloat16": "bf16", "BF16": "bf16", "Half": "fp16", "FP16": "fp16", "Float": "fp32", "FP32": "fp32",
    "Int8": "int8", "Int32": "int32", "Int64": "int64", "Bool": "bool",
}  # fmt: skip

Profiles = dict[str, list[list[int]]]


@dataclass(frozen=True)
class InspectedPlan:
    """One plan, as the engine inspector sees it on a card that it fits."""

    engine: str
    path: Path
    layers: int
    #: Type -> number of layers' outputs in it. Layers of which nothing is said are under `unknown`.
    types: dict[str, int]
    #: Input -> smallest, likeliest and largest shape.
    profiles: Profiles
    #: Bytes on the device beside the weights.
    memory: int


def inspect_plan(engine: str, path: Path, opened: Any, trt: Any) -> InspectedPlan:
    """Inspect `opened`, the deserialised plan in `path` of one optimisation profile, with its module `trt`."""
    said = opened.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
    layers = json.loads(said).get("Layers", [])
    names = [opened.get_tensor_name(index) for index in range(opened.num_io_tensors)]
    inputs = [name for name in names if opened.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
    return InspectedPlan(
        engine, path, len(layers), count_types(layers),
        {name: [list(shape) for shape in opened.get_tensor_profile_shape(name, 0)] for name in inputs},
        int(opened.device_memory_size_v2),
    )  # fmt: skip


def count_types(layers: list[Mapping[str, Any] | str]) -> dict[str, int]:
    """Of the outputs of layers, as the inspector lists them; a plan built without details lists names alone."""
    counted: Counter[str] = Counter()
    for layer in layers:
        outputs = [] if isinstance(layer, str) else layer.get("Outputs", [])
        for output in outputs or [{}]:
            text = str(output.get("Format/Datatype", ""))
            counted[next((name for part, name in TYPES.items() if part in text), "unknown")] += 1
    return dict(counted)
