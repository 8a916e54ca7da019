"""Every engine of a bundle against the torch module it was exported from, on inputs of real runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnxruntime
import torch

from saferedir.engines import Bundle
from saferedir.engines.manifest import SafetyInfo, TensorInfo
from saferedir.export.reference import open_reference
from saferedir_torch.trajectories import encode, initial_noise, sample

#: Worst absolute error allowed in fp32.
TOLERANCE = 1e-4
PROMPTS = ("a church", "a church next to a cat in ink style", "a castle on blue", "")
STEPS = 8
#: Height and width of the latent where the engine takes any.
ANY_SIZE = 16


@dataclass(frozen=True)
class Difference:
    """One output's worst element; booleans and integers count as 0 or 1 (equal or not)."""

    engine: str
    output: str
    worst: float
    where: str
    allowed: float


def compare_with_reference(bundle: Bundle, model: Path | None = None, safety: Path | None = None) -> list[Difference]:
    """Worst difference of every output of every engine, over the steps of real runs of `PROMPTS`.

    Raises:
        SafetyMismatchError: the reference's text encoder or UNet is not the bundle's.
        RequestError: the bundle was made of a published checkpoint, and none was named.
    """
    pipeline, graphs = open_reference(bundle, model, safety)
    tensors = {tensor.name: tensor for engine in bundle.manifest.engines.values() for tensor in engine.inputs}
    runs = _noise(tensors) if pipeline is None else _real_runs(pipeline)
    cases = _cases(runs, bundle.manifest.safety)
    rows = []
    for name, graph in graphs.items():
        session = onnxruntime.InferenceSession(str(bundle.engine_path(name)), providers=["CPUExecutionProvider"])
        worst = dict.fromkeys(graph.outputs, (0.0, ""))
        for case in cases:
            inputs = {key: case[key] for key in graph.inputs}
            with torch.no_grad():
                expected = graph.module.eval()(**inputs)
            expected = expected if isinstance(expected, tuple) else (expected,)
            found = session.run(list(graph.outputs), {key: value.numpy() for key, value in inputs.items()})
            for output, reference, value in zip(graph.outputs, expected, found, strict=True):
                worst[output] = max(worst[output], _worst(reference.numpy(), value))
        rows += [Difference(name, output, *worst[output], TOLERANCE) for output in graph.outputs]
    return rows


def _worst(expected: Any, found: Any) -> tuple[float, str]:
    error = np.abs(expected.astype(np.float64) - found.astype(np.float64))
    index = np.unravel_index(int(error.argmax()), error.shape)
    return float(error[index]), "[" + ", ".join(str(int(i)) for i in index) + "]"


class _Runs(NamedTuple):
    """What a step sees, step after step."""

    #: [B, T] int32, zeros where nothing has a tokenizer.
    ids: torch.Tensor
    #: [B, T, D].
    embeds: torch.Tensor
    #: [B, T, D].
    negative: torch.Tensor
    #: [B, steps, C, h, w].
    latents: torch.Tensor
    #: [steps].
    timesteps: torch.Tensor


def _real_runs(pipeline: Any) -> _Runs:
    ids, embeds = encode(pipeline, list(PROMPTS))
    runs = sample(pipeline, embeds, embeds[-1:], initial_noise(pipeline, list(range(len(PROMPTS)))), steps=STEPS)
    negative = embeds[-1:].expand_as(embeds).contiguous()
    return _Runs(ids.to(torch.int32), embeds, negative, runs.latents.float(), runs.timesteps)


def _noise(tensors: Mapping[str, TensorInfo]) -> _Runs:
    """For a safety alone: noise of the shapes that its engine takes; a dimension that varies is `ANY_SIZE`."""
    generator = torch.Generator().manual_seed(0)

    def noise(name: str, *further: int) -> torch.Tensor:
        shape = [size if isinstance(size, int) else ANY_SIZE for size in tensors[name].shape[1:]]
        return torch.randn(len(PROMPTS), *further, *shape, generator=generator)

    embeds, latents = noise("prompt"), noise("latent", STEPS)
    ids = torch.zeros(embeds.shape[:2], dtype=torch.int32)
    return _Runs(ids, embeds, noise("prompt"), latents, torch.linspace(981, 1, STEPS))


def _cases(runs: _Runs, safety: SafetyInfo) -> list[dict[str, torch.Tensor]]:
    """One set of inputs a step, with the state at every stage: watching, cooling down, already active."""
    batch, concepts = len(PROMPTS), len(safety.concepts)
    thresholds = [0.5 if concept.threshold is None else concept.threshold for concept in safety.concepts]
    cases = []
    for step in range(STEPS):
        latent = runs.latents[:, step].contiguous()
        cases.append(
            {
                "input_ids": runs.ids,
                "latent": latent,
                "timestep": torch.full((batch,), float(runs.timesteps[step])),
                "prompt_embeds": runs.embeds,
                "input_scale": torch.ones(batch),
                "coefficients": torch.tensor([[1.02, -0.05, 0.0, 0.0]]).expand(batch, -1).contiguous(),
                "history": torch.zeros_like(latent),
                "noise": torch.zeros_like(latent),
                "negative": runs.negative,
                "guidance_scale": torch.full((batch,), 5.0),
                "prompt": runs.embeds,
                "original": runs.embeds,
                "original_negative": runs.negative,
                "cooldown": torch.full((batch,), step % 3, dtype=torch.int32),
                "period": torch.full((batch,), 2, dtype=torch.int32),
                "active": torch.full((batch, concepts), step % 2 == 1),
                "ok": torch.ones(batch, dtype=torch.bool),
                "enabled": torch.ones(batch, concepts, dtype=torch.bool),
                "threshold": torch.tensor([thresholds]).repeat(batch, 1),
                "alpha_scale": torch.tensor([[concept.alpha_scale for concept in safety.concepts]]).repeat(batch, 1),
            }
        )
    return cases
