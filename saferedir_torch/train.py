"""Trains a safety module on a diffusers pipeline: one seeded, resumable command.

`python -m saferedir_torch train --model FOLDER --out FOLDER`
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from saferedir_torch.alignment import changed_tokens
from saferedir_torch.config import Concept, SafetyConfig
from saferedir_torch.losses import detection_loss, redirection_loss
from saferedir_torch.safety_module import SafetyModule, parameters_sha256
from saferedir_torch.training_data import LatentBank, PairBank, cached_runs, make_pairs, record_runs
from saferedir_torch.training_run import Schedule, TrainingError, run_training
from saferedir_torch.world.prompts import CONCEPTS, WorldConcept
from saferedir_torch.world.split import Split

STEP_BATCH = 160
PAIR_BATCH = 48
PEAK_RATE = 1e-3
#: Strength s of the redirection formula that step lengths are trained for.
STRENGTH = 1.5
#: A token is to be moved where 1 - cos exceeds this. The oracle ladder shows whether a larger value would do.
TAU = 0.01
VALIDATION_SHARE = 0.1
VALIDATE_EVERY = 250
#: Share of detector cases whose latent is taken from another run, so that neither input can be ignored.
SWAP_SHARE = 0.3
#: Share of detector cases whose prompt is one of the pairs', which are many more than the recorded runs'.
PAIRED_SHARE = 0.5
#: Share of the concepts a prompt does not ask for that the redirector is told are active all the same.
FALSELY_ACTIVE_SHARE = 0.2
#: A threshold lies this far above the highest clean score (in logits) where the scores of unsafe runs leave room.
THRESHOLD_MARGIN = 0.5
#: Share of held-out unsafe runs whose highest score a threshold may exceed.
MISSED_SHARE = 0.01
#: Noise on prompt embeddings, in units of their standard deviation: names never seen lie near seen ones.
PROMPT_NOISE = 0.15


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
    learner = _Learner(module, bank, pair_bank, seed)
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


class _Learner:
    """Draws batches by step number, and measures on the runs and pairs that training leaves out."""

    def __init__(self, module: SafetyModule, bank: LatentBank, pairs: PairBank, seed: int) -> None:
        self.module, self.bank, self.pairs, self.seed = module, bank, pairs, seed
        rng = np.random.default_rng([seed, 31])
        run_count = int(bank.run.max()) + 1
        held = torch.zeros(run_count, dtype=torch.bool)
        held[torch.from_numpy(rng.permutation(run_count)[: int(run_count * VALIDATION_SHARE)])] = True
        row_held = held[bank.run]
        self.train_rows, self.held_rows = torch.where(~row_held)[0], torch.where(row_held)[0]
        order = torch.from_numpy(rng.permutation(len(pairs.asked)))
        cut = int(len(order) * VALIDATION_SHARE)
        self.held_pairs, self.train_pairs = order[:cut], order[cut:]
        self.noise_scale = PROMPT_NOISE * float(pairs.original.float().std())

    def loss_of_step(self, step: int) -> tuple[Tensor, dict[str, float]]:
        rng = np.random.default_rng([self.seed, 32, step])
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        rows = self.train_rows[torch.from_numpy(rng.integers(len(self.train_rows), size=STEP_BATCH))]
        swap = torch.from_numpy(rng.random(STEP_BATCH) < SWAP_SHARE)
        other = self.train_rows[torch.from_numpy(rng.integers(len(self.train_rows), size=STEP_BATCH))]
        paired = torch.from_numpy(rng.random(STEP_BATCH) < PAIRED_SHARE)
        named = self.train_pairs[torch.from_numpy(rng.integers(len(self.train_pairs), size=STEP_BATCH))]
        prompt = torch.where(paired[:, None, None], self.pairs.original[named], self._prompts(rows))
        asked = torch.where(paired[:, None], self.pairs.asked[named], self.bank.asked[rows])
        detected = self._detection(prompt, asked, torch.where(swap | paired, other, rows), generator)
        chosen = self.train_pairs[torch.from_numpy(rng.integers(len(self.train_pairs), size=PAIR_BATCH))]
        shown = self.train_rows[torch.from_numpy(rng.integers(len(self.train_rows), size=PAIR_BATCH))]
        moved, parts = self._redirection(chosen, shown, rng, generator)
        return detected + moved, {"detection": float(detected.detach()), **parts}

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Losses and detector accuracy on held-out runs and pairs."""
        rng = np.random.default_rng([self.seed, 33])
        rows = self.held_rows[torch.from_numpy(rng.integers(len(self.held_rows), size=1500))]
        detected = self._detection(self._prompts(rows), self.bank.asked[rows], rows, None)
        accuracy = self._accuracy(rows)
        chosen = self.held_pairs[:400]
        shown = self.held_rows[torch.from_numpy(rng.integers(len(self.held_rows), size=len(chosen)))]
        moved, parts = self._redirection(chosen, shown, rng, None)
        return {"loss": float(detected + moved), "detection": float(detected), "accuracy": accuracy, **parts}

    @torch.no_grad()
    def calibrate(self) -> list[float]:
        """Per concept, the threshold that no held-out clean run reaches, with a margin; but at least 0.5, and not above
        what all but 1 % of held-out unsafe runs reach.

        Held-out benign pairs count as clean runs too, each seen with the latents of a held-out clean run.
        """
        bank, rows = self.bank, self.held_rows
        logits = self._logits(self._prompts(rows), rows)
        rng = np.random.default_rng([self.seed, 34])
        thresholds = []
        for index in range(logits.shape[1]):
            clean = (bank.asked[rows, index] == 0) & (bank.shown[rows, index] == 0)
            highest = max(_highest(logits[clean, index]), self._highest_of_pairs(index, rows[clean], rng))
            unsafe = torch.unique(bank.run[rows][bank.asked[rows, index] > 0])
            peaks = [_highest(logits[bank.run[rows] == run, index]) for run in unsafe]
            reached = float(np.quantile(peaks, MISSED_SHARE)) if peaks else math.inf
            logit = min(highest + THRESHOLD_MARGIN, reached)
            thresholds.append(round(max(0.5, float(torch.sigmoid(torch.tensor(logit)))), 5))
        return thresholds

    def _highest_of_pairs(self, index: int, clean_rows: Tensor, rng: np.random.Generator) -> float:
        benign = self.held_pairs[self.pairs.asked[self.held_pairs].sum(dim=1) == 0]
        runs = torch.unique(self.bank.run[clean_rows]).numpy()
        highest = -math.inf
        for pair in benign:
            rows = clean_rows[self.bank.run[clean_rows] == int(rng.choice(runs))]
            prompt = self.pairs.original[pair].expand(len(rows), -1, -1)
            highest = max(highest, _highest(self._logits(prompt, rows)[:, index]))
        return highest

    def _prompts(self, rows: Tensor) -> Tensor:
        return self.bank.prompts[self.bank.prompt[rows]]

    def _detection(self, prompt: Tensor, asked: Tensor, latent_rows: Tensor, generator: torch.Generator | None) -> Tensor:
        bank = self.bank
        shown = bank.shown[latent_rows]
        labels = torch.maximum(asked, shown.clamp(min=0))
        weights = ((asked > 0) | (shown >= 0)).float()
        joint = self.module.detector.joint_feature(bank.latent[latent_rows].float(), bank.timestep[latent_rows])
        return detection_loss(self.module.detector.logits(joint, self._noisy(prompt.float(), generator)), labels, weights)

    def _redirection(
        self, chosen: Tensor, shown: Tensor, rng: np.random.Generator, generator: torch.Generator | None
    ) -> tuple[Tensor, dict[str, float]]:
        pairs = self.pairs
        original = pairs.original[chosen].float()
        clean = pairs.target[chosen].float()
        mask = changed_tokens(original, clean, TAU)
        # The target stays clean: what is strange about a name is to be removed, not carried over.
        original, target = self._noisy(original, generator), clean
        active = self._active(chosen, rng)
        joint = self.module.detector.joint_feature(self.bank.latent[shown].float(), self.bank.timestep[shown])
        redirection = self.module.redirection(original, joint, active)
        return redirection_loss(redirection, original, target, mask, strength=STRENGTH)

    def _active(self, chosen: Tensor, rng: np.random.Generator) -> Tensor:
        """Concepts that are active with each pair: those that its target is without, and by chance such as it does not
        ask for; at least one."""
        asked, replaced = self.pairs.asked[chosen], self.pairs.replaced[chosen]
        by_chance = torch.from_numpy(rng.random(asked.shape) < FALSELY_ACTIVE_SHARE).float() * (1 - asked)
        active = torch.maximum(replaced, by_chance)
        one = torch.nn.functional.one_hot(torch.from_numpy(rng.integers(asked.shape[1], size=len(chosen))), asked.shape[1])
        return torch.where(active.sum(dim=1, keepdim=True) > 0, active, one.float())

    def _noisy(self, prompt: Tensor, generator: torch.Generator | None) -> Tensor:
        if generator is None:
            return prompt
        amount = torch.rand(len(prompt), 1, 1, generator=generator) * self.noise_scale
        return prompt + amount * torch.randn(prompt.shape, generator=generator)

    def _logits(self, prompt: Tensor, rows: Tensor) -> Tensor:
        """prompt [S, T, D] seen with the latents and timesteps of `rows` [S] -> logits [S, N]."""
        detector, bank = self.module.detector, self.bank
        parts = []
        for embeds, chunk in zip(torch.split(prompt, 512), torch.split(rows, 512), strict=True):
            joint = detector.joint_feature(bank.latent[chunk].float(), bank.timestep[chunk])
            parts.append(detector.logits(joint, embeds.float()))
        return torch.cat(parts)

    def _accuracy(self, rows: Tensor) -> float:
        asked, shown = self.bank.asked[rows], self.bank.shown[rows]
        known = (asked > 0) | (shown >= 0)
        truth = torch.maximum(asked, shown.clamp(min=0)) > 0
        return float(((self._logits(self._prompts(rows), rows) >= 0) == truth)[known].float().mean())


def _highest(logits: Tensor) -> float:
    return float(logits.max()) if len(logits) else -math.inf


def _say(done: int, total: int) -> None:
    print(json.dumps({"recorded": done, "of": total}), flush=True)


__all__ = ["TrainingError", "new_module", "train"]
