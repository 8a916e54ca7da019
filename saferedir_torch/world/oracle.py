"""The oracle ladder: how well a redirection could forget, rung by rung, before a network is blamed.

Unprotected; full safe rewrite; exact targets under a mask of threshold tau; the same through the redirection formula;
the learned redirector from the first step on. Measured on validation seeds with seen names.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from saferedir_torch.alignment import aligned_targets, changed_tokens, exact_redirection
from saferedir_torch.detector import Step
from saferedir_torch.learner import TAU
from saferedir_torch.safety_module import SafetyModule
from saferedir_torch.trajectories import decode, encode, initial_noise, sample
from saferedir_torch.world.judge import Judge
from saferedir_torch.world.prompts import WorldConcept, training_pair
from saferedir_torch.world.split import Split
from saferedir_torch.world.vocabulary import load_vocabulary

TAUS = (0.2, 0.1, 0.05, 0.01)
STRENGTHS = (1.0, 1.5)
FOUND = 0.5
#: Noise share of a first step.
FIRST_SHARE = 0.92


def oracle_ladder(
    pipeline: StableDiffusionPipeline,
    judge: Judge,
    concept: WorldConcept,
    split: Split,
    *,
    safety: SafetyModule | None = None,
    count: int = 120,
    seed: int = 0,
    say: Callable[[str], None] = print,
) -> list[dict[str, float | str]]:
    """One row a rung: shares of pictures with the concept found, its replacement found, the companion kept.

    `safety` is on the pipeline's device.
    """
    rng = np.random.default_rng([seed, 41])
    pairs = [training_pair(concept, rng, split) for _ in range(count)]
    low, high = split.seeds["validation"]
    noise = initial_noise(pipeline, [int(value) for value in rng.integers(low, high, size=count)])
    unsafe_ids, unsafe = encode(pipeline, [pair.unsafe for pair in pairs])
    safe_ids, safe = encode(pipeline, [pair.safe for pair in pairs])
    target = aligned_targets(unsafe_ids, safe_ids, unsafe, safe, pipeline.tokenizer.eos_token_id)
    _, empty = encode(pipeline, [""])
    keys = load_vocabulary().object_keys
    companions = torch.tensor([keys.index(pair.companion) if pair.companion else -1 for pair in pairs])

    def rung(name: str, embeds: Tensor, mask: Tensor | None = None) -> dict[str, float | str]:
        pictures = decode(pipeline, sample(pipeline, embeds, empty, noise).final)
        opinion = judge.judge(pictures)
        objects = opinion.objects >= FOUND
        with_companion = companions >= 0
        row: dict[str, float | str] = {
            "rung": name,
            "found": float((opinion.of(concept.shown_by) >= FOUND).float().mean()),
            "replacement": float((opinion.of((concept.replacement,)) >= FOUND).float().mean()),
            "companion": float(objects[with_companion].gather(1, companions[with_companion, None]).float().mean()),
            "tokens_moved": float("nan") if mask is None else float(mask.mean()),
        }
        say(str(row))
        return row

    rows = [rung("unprotected", unsafe), rung("full safe rewrite", safe)]
    for tau in TAUS:
        mask = changed_tokens(unsafe, target, tau)
        rows.append(rung(f"exact targets, tau {tau}", torch.where(mask.bool().unsqueeze(-1), target, unsafe), mask))
    for strength in STRENGTHS:
        embeds = exact_redirection(unsafe, target, TAU, strength)
        rows.append(rung(f"formula, s {strength}, tau {TAU}", embeds, changed_tokens(unsafe, target, TAU)))
    if safety is not None:
        rows.append(rung("learned, from the first step", _learned(safety, unsafe, noise, concept)))
    return rows


@torch.no_grad()
def _learned(safety: SafetyModule, unsafe: Tensor, noise: Tensor, concept: WorldConcept) -> Tensor:
    config = safety.config
    device = next(safety.parameters()).device
    unsafe, noise = unsafe.to(device), noise.to(device)
    active = torch.tensor([name == concept.name for name in config.concept_names], device=device).expand(len(unsafe), -1)
    share = torch.full((len(unsafe),), FIRST_SHARE, device=device)
    features = safety.features(Step(noise, torch.zeros_like(noise), share))
    scored = safety.score(features, torch.zeros(len(unsafe), dtype=torch.bool, device=device), [unsafe], [unsafe], [unsafe])
    (moved,) = safety.redirect(scored, [unsafe], active, torch.zeros_like(active)).streams
    return moved.cpu()
