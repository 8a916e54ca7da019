"""Unprotected trajectories of given prompts, recorded in chunks so that a stopped recording goes on."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from saferedir.engines.errors import RequestError
from saferedir_torch.trajectories import encode, initial_noise, sample


@dataclass
class RecordedRuns:
    """What detector and UNet saw: latent and denoised [R, S, C, h, w] fp16, timestep [S], prompt [R, T, D] fp16."""

    latent: Tensor
    #: The estimate that the step before made, zero in the first.
    denoised: Tensor
    timestep: Tensor
    prompt: Tensor


def record(
    pipeline: StableDiffusionPipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    steps: int,
    guidance_scale: float,
    folder: Path,
    chunk: int = 100,
    on_progress: Callable[[int, int], None] | None = None,
) -> RecordedRuns:
    """Draw unprotected runs of `prompts`, in chunks that are kept in `folder`, so that a stopped recording goes on."""
    folder.mkdir(parents=True, exist_ok=True)
    stated = json.dumps({"prompts": list(prompts), "seeds": list(seeds), "steps": steps, "guidance_scale": guidance_scale})
    _, empty = encode(pipeline, [""])
    parts = []
    for start in range(0, len(prompts), chunk):
        path = folder / f"runs-{start:06d}.safetensors"
        if not path.exists():
            _, embeds = encode(pipeline, list(prompts[start : start + chunk]))
            noise = initial_noise(pipeline, list(seeds[start : start + chunk]))
            drawn = sample(pipeline, embeds, empty, noise, steps=steps, guidance_scale=guidance_scale, exact=False)
            tensors = vars(RecordedRuns(drawn.latents, drawn.denoised, drawn.timesteps, embeds.half()))
            partial = path.with_suffix(".partial")
            save_file({key: value.contiguous() for key, value in tensors.items()}, partial, metadata={"made_from": stated})
            os.replace(partial, path)
        parts.append(_load_runs(path, stated))
        if on_progress is not None:
            on_progress(min(start + chunk, len(prompts)), len(prompts))
    latent, denoised, prompt = (torch.cat([part[name] for part in parts]) for name in ("latent", "denoised", "prompt"))
    return RecordedRuns(latent, denoised, parts[0]["timestep"], prompt)


def _load_runs(path: Path, stated: str) -> dict[str, Tensor]:
    try:
        with safe_open(path, "pt") as file:
            if file.metadata()["made_from"] != stated:
                raise RequestError(f"{path} was recorded with other prompts, seeds or steps; give another folder")
        return load_file(path)
    except (OSError, SafetensorError, KeyError, TypeError) as error:
        raise RequestError(f"{path} holds no recorded runs ({error}); delete it to record them anew") from error
