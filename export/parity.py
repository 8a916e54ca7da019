"""Every engine of a bundle against the torch module it was exported from, on inputs of real runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch

from saferedir.engines import Bundle
from saferedir.engines.errors import SafetyMismatchError
from saferedir.export.graphs import all_graphs
from saferedir_torch.models import SHIPPED_MODEL, SHIPPED_SAFETY, load_pipeline
from saferedir_torch.safety_module import SafetyModule, parameters_sha256
from saferedir_torch.trajectories import encode, initial_noise, sample

#: Worst absolute error allowed in fp32.
TOLERANCE = 1e-4
PROMPTS = ("a church", "a church next to a cat in ink style", "a castle on blue", "")
STEPS = 8


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
    """
    pipeline = load_pipeline(model or SHIPPED_MODEL)
    module = SafetyModule.load(safety or SHIPPED_SAFETY)
    info = bundle.manifest.model
    hashes = (parameters_sha256(pipeline.text_encoder), parameters_sha256(pipeline.unet))
    if hashes != (info.text_encoder_sha256, info.unet_sha256):
        raise SafetyMismatchError(
            f"the reference in {model or SHIPPED_MODEL} is not the model that {bundle.folder} was made of"
        )
    cases = _cases(pipeline, module)
    rows = []
    for name, graph in all_graphs(pipeline, module).items():
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


def _cases(pipeline: Any, module: SafetyModule) -> list[dict[str, torch.Tensor]]:
    """One set of inputs a step, with the state at every stage: watching, cooling down, already active."""
    ids, embeds = encode(pipeline, list(PROMPTS))
    negative = embeds[-1:].expand_as(embeds).contiguous()
    runs = sample(pipeline, embeds, embeds[-1:], initial_noise(pipeline, list(range(len(PROMPTS)))), steps=STEPS)
    batch, concepts = len(PROMPTS), len(module.config.concepts)
    scores = torch.tensor([[concept.threshold for concept in module.config.concepts]]).expand(batch, -1)
    scales = torch.tensor([[concept.alpha_scale for concept in module.config.concepts]]).expand(batch, -1)
    cases = []
    for step in range(STEPS):
        latent = runs.latents[:, step].float()
        time = torch.full((batch,), float(runs.timesteps[step]))
        cases.append(
            {
                "input_ids": ids.to(torch.int32),
                "latent": latent,
                "timestep": time,
                "prompt_embeds": embeds,
                "input_scale": torch.ones(batch),
                "coefficients": torch.tensor([[1.02, -0.05, 0.0, 0.0]]).expand(batch, -1).contiguous(),
                "history": torch.zeros_like(latent),
                "noise": torch.zeros_like(latent),
                "negative": negative,
                "guidance_scale": torch.full((batch,), 5.0),
                "prompt": embeds,
                "original": embeds,
                "cooldown": torch.full((batch,), step % 3, dtype=torch.int32),
                "period": torch.full((batch,), 2, dtype=torch.int32),
                "active": torch.full((batch, concepts), step % 2 == 1),
                "ok": torch.ones(batch, dtype=torch.bool),
                "enabled": torch.ones(batch, concepts, dtype=torch.bool),
                "threshold": scores.contiguous(),
                "alpha_scale": scales.contiguous(),
            }
        )
    return cases
