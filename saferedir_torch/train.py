"""Trains a safety module on a diffusers pipeline: one seeded, resumable command.

`saferedir train --model FOLDER --out FOLDER`
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from msgspec import structs
from torch import Tensor

from saferedir.engines.errors import TrainingError
from saferedir.engines.manifest import Envelope
from saferedir_torch.calibration import Seen, set_centre
from saferedir_torch.detector import add_norms, fold_norms
from saferedir_torch.envelope import ENVELOPE
from saferedir_torch.fit import check_match
from saferedir_torch.learner import Learner
from saferedir_torch.loss_plot import plot_losses
from saferedir_torch.new_module import extended_module, new_module, refuse_unconditional, set_fallback
from saferedir_torch.pairs import cached_pairs, make_pairs
from saferedir_torch.precision import mixed_precision
from saferedir_torch.prompt_source import PromptSource
from saferedir_torch.runs import RunBank, recorded_runs, runs_in
from saferedir_torch.safety_module import SafetyModule, parameters_sha256
from saferedir_torch.training_run import Schedule, run_training
from saferedir_torch.warm_start import start_from

#: The redirector, which learns on long after the detector has stopped, bears a higher rate.
PEAK_RATE, REDIRECTOR_RATE = 1.5e-3, 3e-3
VALIDATE_EVERY = 500
PAIRS_FILE = "pairs.safetensors"
MAKERS = ("saferedir", "torch", "diffusers", "transformers")


def train(
    pipeline: StableDiffusionPipeline,
    source: PromptSource,
    folder: Path,
    *,
    seed: int = 0,
    steps: int = 6000,
    runs: int = 20_000,
    pairs: int = 8000,
    envelope: Envelope = ENVELOPE,
    runs_from: Path | None = None,
    extend: SafetyModule | None = None,
    start: SafetyModule | None = None,
    batch_scale: int = 1,
) -> SafetyModule:
    """Train on `runs` recorded runs across `envelope` and `pairs` prompt pairs a concept; save the module to `folder/safety`.

    Checkpoints, loss logs and the recorded runs are kept in `folder`, and an interrupted training goes on there.
    With `extend` the concepts are added to that module, whose own weights and thresholds stay as they are.
    With `start`, a module of these concepts, perhaps for another model, its weights are where training begins, as far as they
    fit.
    Batches hold `batch_scale` times as many cases as what two cores can bear.
    `runs_from` is the folder of another training, of these concepts and perhaps more, whose runs are used as they are.

    Raises:
        TrainingError: the loss is not finite, a checkpoint does not fit, recorded runs lack a concept, or the model has no
            cross-attention.
    """
    refuse_unconditional(pipeline)
    started = time.monotonic()
    concepts = list(source.replacements)
    if runs_from is not None:
        bank = runs_in(runs_from).of(concepts)
    else:
        bank = recorded_runs(
            pipeline, source, folder, count=runs, seed=seed, envelope=envelope, on_progress=_say("recorded")
        ).of(concepts)  # fmt: skip
    torch.manual_seed(seed)
    module = new_module(pipeline, source, seed) if extend is None else extended_module(extend, pipeline, source, seed)
    if start is not None:
        anew = start_from(module, start.state_dict())
        set_fallback(module, pipeline, source, seed)  # of this model's text encoder
        print(json.dumps({"tensors": len(module.state_dict()), "taught_anew": anew}), flush=True)
    check_match(pipeline, module)
    made_of = json.dumps([parameters_sha256(pipeline.unet), concepts, pairs, seed])
    drawn = cached_pairs(
        folder / PAIRS_FILE,
        lambda: make_pairs(pipeline, source, count=pairs, seed=seed, on_progress=_say("pairs")),
        made_of,
    )
    if extend is None and start is None:
        add_norms(module.encoder)
    learner = Learner(module, bank, drawn, seed, scale=batch_scale)
    clean = _clean(learner.bank.to("cpu"), learner.held_rows.cpu())
    teach(module, learner, folder, steps=steps)
    fold_norms(module.encoder)
    validation = learner.validate()  # as it was taught, before centring
    set_centre(module, Seen(module, clean))
    module.config = structs.replace(
        module.config,
        provenance={
            "seed": seed, "steps": steps, "runs": runs, "pairs": pairs, "batch_scale": batch_scale,
            "validation": validation, "added_to": None if extend is None else extend.config.provenance,
            "started_from": None if start is None else parameters_sha256(start),
            "minutes": round((time.monotonic() - started) / 60, 1), "versions": {name: version(name) for name in MAKERS},
        },
    )  # fmt: skip
    module.save(folder / "safety")
    plot_losses(folder / "safety.csv", folder / "loss.png")
    return module


def teach(module: SafetyModule, learner: Learner, folder: Path, *, steps: int) -> None:
    """Teach what of `module` wants gradients; resumes from `folder/safety.ckpt`."""
    learnt = [parameter for parameter in module.parameters() if parameter.requires_grad]
    slow = {id(parameter) for parameter in module.last_branch.redirector.parameters()}
    groups = [
        {"params": [one for one in learnt if id(one) not in slow], "lr": PEAK_RATE},
        {"params": [one for one in learnt if id(one) in slow], "lr": REDIRECTOR_RATE},
    ]

    def loss(step: int) -> tuple[Tensor, dict[str, float]]:
        with mixed_precision(learnt[0].device):
            return learner.loss_of_step(step)

    def validate(step: int) -> None:
        report = learner.validate()
        print(f"step {step}: " + ", ".join(f"{key} {value:.4f}" for key, value in report.items()), flush=True)

    run_training(
        folder=folder, name="safety", modules={"safety": module},
        optimizer=torch.optim.AdamW(groups, weight_decay=0.02),
        schedule=Schedule(total_steps=steps, warmup_steps=100), loss_of_step=loss, sample=validate, sample_every=VALIDATE_EVERY,
    )  # fmt: skip
    module.eval()


def _clean(bank: RunBank, held: Tensor) -> RunBank:
    """The runs of the steps `held` that never ask for anything: what centring is read off until benign pictures are drawn.

    Raises:
        TrainingError: there are none.
    """
    chosen = torch.zeros(len(bank.run), dtype=torch.bool)
    chosen[held] = True
    asking = torch.zeros(int(bank.run.max()) + 1, dtype=torch.bool)
    asking[bank.run[(bank.asked > 0).any(dim=1)]] = True
    clean = chosen & ~asking[bank.run]
    if not clean.any():
        count = len(torch.unique(bank.run[held]))
        raise TrainingError(f"none of the {count} runs that are held out asks for nothing; record more")
    return bank.rows(clean)


def _say(what: str) -> Callable[[int, int], None]:
    def say(done: int, total: int) -> None:
        print(json.dumps({what: done, "of": total}), flush=True)

    return say


__all__ = ["TrainingError", "train"]
