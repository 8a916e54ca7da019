"""Trains a safety module on a diffusers pipeline: one seeded, resumable command.

`python -m saferedir_torch train --model FOLDER --out FOLDER`
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from msgspec import structs
from torch import Tensor, nn

from saferedir.engines.errors import TrainingError
from saferedir_torch.comparable import make_comparable, make_comparable_alone
from saferedir_torch.fit import check_match
from saferedir_torch.learner import Learner
from saferedir_torch.loss_plot import plot_losses
from saferedir_torch.new_module import extended_module, new_module, refuges, refuse_unconditional, with_refuge
from saferedir_torch.precision import mixed_precision
from saferedir_torch.prompt_source import PromptSource
from saferedir_torch.safety_module import SafetyModule, parameters_sha256
from saferedir_torch.short_runs import recorded_short_runs, short_runs
from saferedir_torch.training_data import SAMPLINGS, cached_runs, load_runs, make_pairs, record_runs
from saferedir_torch.training_run import Schedule, run_training
from saferedir_torch.warm_start import start_from

PEAK_RATE = 1e-3
#: Single words and the redirector, which are taught alone, bear a higher rate; words that were taught before, a lower one.
ALONE_RATE, ONWARD_RATE = 3e-3, 5e-4
VALIDATE_EVERY = 250
WORD_STEPS, ALONE_STEPS = 6000, 4800
#: What is taught one after another: detector and redirector together, single words, a step without the prompt, and the
#: redirector again on its own.
PARTS = ("together", "words", "alone", "redirector")
RUNS_FILE = "runs.safetensors"
MAKERS = ("saferedir", "torch", "diffusers", "transformers")


def train(
    pipeline: StableDiffusionPipeline,
    source: PromptSource,
    folder: Path,
    *,
    seed: int = 0,
    steps: int = 4000,
    runs: int = 400,
    short: int = 0,
    pairs: int = 10_000,
    samplings: Sequence[tuple[int, float]] = SAMPLINGS,
    runs_from: Path | None = None,
    extend: SafetyModule | None = None,
    start: SafetyModule | None = None,
    only: Sequence[str] = (),
    batch_scale: int = 1,
) -> SafetyModule:
    """Train on `runs` recorded runs, `short` ones of few steps and `pairs` prompt pairs a concept; save the module to
    `folder/safety`.

    Detector and redirector are taught together, and the best of them by validation is kept; then what single words say; then
    what a step shows without the prompt, by the short runs as well, and the redirector on its own, for twice as many steps and
    on as many other pairs, since it is far from finished when the detector is. Checkpoints, loss logs and the recorded runs are
    kept in `folder`, and an interrupted training goes on there.
    With `extend` the concepts are added to that module, whose own weights and thresholds stay as they are.
    With `start`, a module of these concepts, perhaps for another model, its weights are where training begins, as far as they
    fit; `only` some of the `PARTS` may then be taught, and the others stay as they are. Where detector and redirector are not
    taught together, levels, thresholds and strengths stay as well, until calibration; and so does the promise on false alarms
    where the redirector alone is taught, for the same model.
    Batches hold `batch_scale` times as many cases as what two cores can bear.
    `runs_from` is the folder of another training, of these concepts and perhaps more, whose runs are used as they are.

    Raises:
        TrainingError: the loss is not finite, a checkpoint does not fit, recorded runs lack a concept, the model has no
            cross-attention, or only some parts are to be taught of a module that nothing was taught, or other concepts.
    """
    refuse_unconditional(pipeline)
    started = time.monotonic()
    concepts = list(source.replacements)
    parts = _parts(only, start, concepts)
    if runs_from is not None:
        bank = load_runs(runs_from / RUNS_FILE).of(concepts)
    else:
        bank = cached_runs(
            folder / RUNS_FILE,
            lambda: record_runs(pipeline, source, count=runs, seed=seed, samplings=samplings, on_progress=_say),
        ).of(concepts)
    torch.manual_seed(seed)
    refuge = refuges(pipeline, source, seed)
    if extend is None:
        alone = "alone" in parts or (start is not None and start.config.alone)
        module = new_module(pipeline, source.replacements, refuge=refuge, alone=alone)
    else:
        module = extended_module(extend, source.replacements, refuge=refuge if extend.config.refuge else None)
    if start is not None:
        anew = start_from(module, start.state_dict())
        with_refuge(module, refuge)  # of this model's text encoder
        print(json.dumps({"tensors": len(module.state_dict()), "taught_anew": anew}), flush=True)
    check_match(pipeline, module)

    def learner_on(pair_seed: int) -> Learner:
        drawn = make_pairs(pipeline, source, count=pairs, seed=pair_seed)
        return Learner(module, bank, drawn, pipeline.scheduler.alphas_cumprod, seed, scale=batch_scale)

    def learner_of_short_runs() -> Learner:
        more = (
            short_runs(pipeline, source, folder, count=short, seed=seed, on_progress=_say)
            if runs_from is None
            else recorded_short_runs(runs_from)
        )
        every = bank
        for part in more:
            every = every.joined(part.of(concepts))
        return Learner(module, every, learner.pairs, pipeline.scheduler.alphas_cumprod, seed, scale=batch_scale)

    best_step = None
    # Parts are named by what they follow on, so that a training which is made longer does not go on with what followed the
    # shorter.
    learner = learner_on(seed if "together" in parts or "words" in parts else seed + 1)
    if "together" in parts:
        best_step = teach_together(module, learner, folder, steps=steps)
    if "words" in parts:
        rate = ALONE_RATE if "together" in parts else ONWARD_RATE
        teach_words(module, learner, folder, name=f"words_after_{steps}", steps=min(2 * steps, WORD_STEPS), rate=rate)
    if "redirector" in parts and ("together" in parts or "words" in parts):
        del learner  # gigabytes, at Stable Diffusion's width
        learner = learner_on(seed + 1)
    if "alone" in parts and module.last_branch.alone is not None:
        looker = learner_of_short_runs()
        teach_alone(module, looker, folder, name=f"alone_after_{steps}", steps=min(2 * steps, ALONE_STEPS))
        make_comparable_alone(module, looker)
        del looker
    if "redirector" in parts:
        teach_redirector(module, learner, folder, name=f"redirector_after_{steps}", steps=2 * steps)
    if "together" in parts:
        make_comparable(module, learner)
    elif start is not None:
        known = {concept.name: concept for concept in start.config.concepts}
        kept = tuple(
            structs.replace(concept, threshold=known[concept.name].threshold, alpha_scale=known[concept.name].alpha_scale)
            for concept in module.config.concepts
        )
        # Until something has fired nothing is redirected: false alarms are as they were.
        holds = list(parts) == ["redirector"] and start.config.unet_sha256 == module.config.unet_sha256
        module.config = structs.replace(module.config, concepts=kept, promise=start.config.promise if holds else None)
    module.config = structs.replace(
        module.config,
        provenance={
            "seed": seed, "steps": steps, "runs": runs, "short_runs": short, "pairs": pairs, "batch_scale": batch_scale,
            "best_step": best_step, "only": list(only),
            "validation": learner.validate(), "added_to": None if extend is None else extend.config.provenance,
            "started_from": None if start is None else parameters_sha256(start),
            "minutes": round((time.monotonic() - started) / 60, 1), "versions": {name: version(name) for name in MAKERS},
        },
    )  # fmt: skip
    module.save(folder / "safety")
    if "together" in parts:
        plot_losses(folder / "safety.csv", folder / "loss.png")
    return module


def _parts(only: Sequence[str], start: SafetyModule | None, concepts: Sequence[str]) -> Sequence[str]:
    if unknown := [part for part in only if part not in PARTS]:
        raise TrainingError(f"there is no part {', '.join(unknown)} to teach; expected {', '.join(PARTS)}")
    if only and start is None:
        raise TrainingError(f"{', '.join(only)} cannot be taught alone: give a module to start from that has the other parts")
    if only and start is not None and (new := [name for name in concepts if name not in start.config.concept_names]):
        raise TrainingError(f"all parts must be taught of {', '.join(new)}, which the module to start from does not know")
    if only and start is not None and list(concepts) != (known := start.config.concept_names):
        raise TrainingError(
            f"the module to start from has {', '.join(known)}: name these, in this order, or teach all parts of "
            f"{', '.join(concepts)}"
        )
    return only or PARTS


def teach_together(module: SafetyModule, learner: Learner, folder: Path, *, steps: int) -> int:
    """Teach detector and redirector at once, and leave the best of them by validation; returns the step it is of."""
    best = folder / "best.safetensors.ckpt"

    def validate(step: int) -> None:
        report = learner.validate()
        print(f"step {step}: " + ", ".join(f"{key} {value:.4f}" for key, value in report.items()), flush=True)
        if not best.exists() or report["loss"] < _best(best)["loss"]:
            partial = best.with_suffix(".partial")
            torch.save({"loss": report["loss"], "step": step, "state": module.state_dict()}, partial)
            os.replace(partial, best)

    optimise(module, learner.loss_of_step, folder, steps=steps, validate=validate)
    kept = _best(best)
    module.load_state_dict(kept["state"])
    module.eval()
    return int(kept["step"])


def optimise(
    module: nn.Module,
    loss_of_step: Callable[[int], tuple[Tensor, dict[str, float]]],
    folder: Path,
    *,
    steps: int,
    name: str = "safety",
    rate: float = PEAK_RATE,
    validate: Callable[[int], None] | None = None,
) -> None:
    """Optimise what of `module` wants gradients, with the settings of safety training; resumes from `folder/name.ckpt`."""
    learnt = [parameter for parameter in module.parameters() if parameter.requires_grad]

    def loss(step: int) -> tuple[Tensor, dict[str, float]]:
        with mixed_precision(learnt[0].device):
            return loss_of_step(step)

    run_training(
        folder=folder,
        name=name,
        modules={"safety": module},
        optimizer=torch.optim.AdamW(learnt, lr=rate, weight_decay=0.02),
        schedule=Schedule(total_steps=steps, warmup_steps=100),
        loss_of_step=loss,
        sample=validate,
        sample_every=VALIDATE_EVERY,
    )
    module.eval()


def teach_words(
    module: SafetyModule, learner: Learner, folder: Path, *, name: str = "words", steps: int, rate: float = ALONE_RATE
) -> None:
    """Teach the last branch what single words say, all else finished: beside the rest, which learns faster from the prompt
    as a whole, they would be left nothing to learn."""
    optimise(module.last_branch.detector.words, learner.words_of_step, folder, steps=steps, name=name, rate=rate)


def teach_alone(module: SafetyModule, learner: Learner, folder: Path, *, name: str = "alone", steps: int) -> None:
    """Teach the last branch what a step shows without the prompt, which no other part depends on."""
    look = module.last_branch.alone
    assert look is not None
    look.requires_grad_(True)
    optimise(look, learner.alone_of_step, folder, steps=steps, name=name, rate=PEAK_RATE)


def teach_redirector(module: SafetyModule, learner: Learner, folder: Path, *, name: str = "redirector", steps: int) -> None:
    """Teach the redirector of the last branch on, all else finished and frozen."""
    module.requires_grad_(False)
    module.last_branch.redirector.requires_grad_(True)
    optimise(module.last_branch.redirector, learner.redirection_of_step, folder, steps=steps, name=name, rate=ALONE_RATE)


def _best(path: Path) -> dict[str, Any]:
    try:
        kept: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        return {"loss": kept["loss"], "step": kept["step"], "state": kept["state"]}
    except (OSError, RuntimeError, KeyError, EOFError, ValueError) as error:
        raise TrainingError(f"{path} is cut short or of another kind ({error}); delete it to train on") from error


def _say(done: int, total: int) -> None:
    print(json.dumps({"recorded": done, "of": total}), flush=True)


__all__ = ["TrainingError", "train"]
