"""Trains a safety module on a diffusers pipeline: one seeded, resumable command.

`python -m saferedir_torch train --model FOLDER --out FOLDER`
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline

from saferedir_torch.config import Concept, SafetyConfig
from saferedir_torch.learner import STRENGTH, Learner
from saferedir_torch.safety_module import SafetyModule, parameters_sha256
from saferedir_torch.training_data import cached_runs, make_pairs, record_runs
from saferedir_torch.training_run import Schedule, TrainingError, run_training
from saferedir_torch.world.prompts import CONCEPTS, WorldConcept
from saferedir_torch.world.split import Split

PEAK_RATE = 1e-3
VALIDATE_EVERY = 250


def new_module(pipeline: StableDiffusionPipeline, concepts: Sequence[WorldConcept], **widths: Any) -> SafetyModule:
    """An untrained safety module that fits `pipeline`."""
    config = SafetyConfig(
        latent_channels=pipeline.unet.config.in_channels,
        prompt_tokens=pipeline.tokenizer.model_max_length,
        prompt_width=pipeline.unet.config.cross_attention_dim,
        prediction_type=pipeline.scheduler.config.prediction_type,
        concepts=tuple(Concept(name=c.name, replacement=c.replacement, alpha_scale=STRENGTH) for c in concepts),
        text_encoder_sha256=parameters_sha256(pipeline.text_encoder),
        unet_sha256=parameters_sha256(pipeline.unet),
        **widths,
    )
    return SafetyModule(config)


def train(
    pipeline: StableDiffusionPipeline,
    split: Split,
    folder: Path,
    *,
    concepts: Sequence[str] = ("church",),
    seed: int = 0,
    steps: int = 1500,
    runs: int = 400,
    pairs: int = 5000,
) -> SafetyModule:
    """Train on `runs` recorded runs and `pairs` prompt pairs a concept; save the best by validation to `folder/safety`.

    Checkpoints, the loss log and the recorded runs are kept in `folder`, and an interrupted training goes on there.

    Raises:
        TrainingError: the loss is not finite, or a checkpoint does not fit.
    """
    wanted = [CONCEPTS[name] for name in concepts]
    bank = cached_runs(
        folder / "runs.safetensors",
        lambda: record_runs(pipeline, wanted, split, count=runs, seed=seed, on_progress=_say),
    )
    pair_bank = make_pairs(pipeline, wanted, split, count=pairs, seed=seed)
    torch.manual_seed(seed)
    module = new_module(pipeline, wanted)
    learner = Learner(module, bank, pair_bank, pipeline.scheduler.alphas_cumprod, seed)
    optimizer = torch.optim.AdamW(module.parameters(), lr=PEAK_RATE, weight_decay=0.02)
    best = folder / "best.safetensors.ckpt"

    def validate(step: int) -> None:
        report = learner.validate()
        print(f"step {step}: " + ", ".join(f"{key} {value:.4f}" for key, value in report.items()), flush=True)
        kept = torch.load(best, weights_only=True)["loss"] if best.exists() else float("inf")
        if report["loss"] < kept:
            torch.save({"loss": report["loss"], "step": step, "state": module.state_dict()}, best)

    run_training(
        folder=folder,
        name="safety",
        modules={"safety": module},
        optimizer=optimizer,
        schedule=Schedule(total_steps=steps, warmup_steps=100),
        loss_of_step=learner.loss_of_step,
        sample=validate,
        sample_every=VALIDATE_EVERY,
    )
    kept = torch.load(best, weights_only=True)
    module.load_state_dict(kept["state"])
    module.eval()
    thresholds = learner.calibrate()
    named = tuple(dataclasses.replace(c, threshold=t) for c, t in zip(module.config.concepts, thresholds, strict=True))
    module.config = dataclasses.replace(
        module.config,
        concepts=named,
        provenance={
            "seed": seed, "steps": steps, "runs": runs, "pairs": pairs, "best_step": kept["step"],
            "validation": learner.validate(),
        },
    )  # fmt: skip
    module.save(folder / "safety")
    return module


def _say(done: int, total: int) -> None:
    print(json.dumps({"recorded": done, "of": total}), flush=True)


__all__ = ["TrainingError", "new_module", "train"]
