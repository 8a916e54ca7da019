"""The published network, taught by the runs and pairs that the method here learns from, to stand beside it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import StableDiffusionPipeline
from torch import Tensor

from saferedir_torch.alignment import changed_tokens
from saferedir_torch.estimate import NoiseLevels
from saferedir_torch.learner import PAIR_BATCH, TAU, Learner
from saferedir_torch.new_module import new_module
from saferedir_torch.pairs import make_pairs
from saferedir_torch.published import PublishedNetwork, published_step
from saferedir_torch.redirector import REACH
from saferedir_torch.runs import runs_in
from saferedir_torch.training_run import Schedule, run_training
from saferedir_torch.world.source import WorldPrompts
from saferedir_torch.world.split import Split

STEPS, PEAK_RATE = 1500, 1e-3


def train_published(
    pipeline: StableDiffusionPipeline, concept: str, split: Split, runs: Path, folder: Path, steps: int = STEPS
) -> PublishedNetwork:
    """Its step is taught by the distance to the aligned rewrite; `runs` is the folder of a training, `folder` for this one."""
    source = WorldPrompts([concept], split)
    teacher = Learner(
        new_module(pipeline, source, 0), runs_in(runs).of([concept]), make_pairs(pipeline, source, count=5000, seed=0), 0
    )
    torch.manual_seed(0)
    unet, tokens = pipeline.unet.config, pipeline.tokenizer.model_max_length
    bank, pairs, device = teacher.bank, teacher.pairs, teacher.device
    network = PublishedNetwork(tokens=tokens, width=unet.cross_attention_dim, channels=unet.in_channels).to(device)
    unsafe = teacher.train_pairs[pairs.replaced[teacher.train_pairs, 0] > 0]
    levels = NoiseLevels(pipeline.scheduler)
    shares = torch.tensor([levels.at(float(timestep)).share for timestep in range(len(pipeline.scheduler.alphas_cumprod))])

    def timesteps(of: Tensor) -> Tensor:
        """The published network is told timesteps, not noise shares."""
        return torch.searchsorted(shares, of.cpu().contiguous()).float().to(device)

    def loss_of_step(step: int) -> tuple[Tensor, dict[str, float]]:
        cases = teacher.cases_of_step(step)
        logits = network(cases.step.latent, cases.drawn, timesteps(cases.step.share)).logits
        asked, shown = cases.asked[:, 0], cases.shown[:, 0]
        labels = torch.maximum(asked, shown).clamp(min=0)
        known = (labels > 0) | (asked == 0) & (shown == 0)
        detected = F.cross_entropy(logits[known], labels[known].long())
        rng = np.random.default_rng([0, 35, step])
        chosen = unsafe[torch.from_numpy(rng.integers(len(unsafe), size=PAIR_BATCH))]
        shown = teacher.train_rows[torch.from_numpy(rng.integers(len(teacher.train_rows), size=PAIR_BATCH))]
        original, target = (side[chosen].to(device).float() for side in (pairs.original, pairs.target))
        output = network(bank.latent[shown].to(device).float(), original, timesteps(bank.share[shown]))
        mask = changed_tokens(original, target, TAU)
        norm = original.norm(dim=-1).clamp(min=1e-6)
        distance = ((published_step(original, output, REACH) - target).norm(dim=-1) / norm).square()
        masked = F.binary_cross_entropy(output.mask.clamp(1e-6, 1 - 1e-6), mask)
        moved = distance.mean() + (distance * mask).sum() / mask.sum().clamp(min=1)
        return detected + masked + 2 * moved, {"detection": float(detected.detach()), "moved": float(moved.detach())}

    run_training(
        folder=folder, name="published", modules={"published": network},
        optimizer=torch.optim.AdamW(network.parameters(), lr=PEAK_RATE, weight_decay=0.02),
        schedule=Schedule(total_steps=steps, warmup_steps=100), loss_of_step=loss_of_step,
    )  # fmt: skip
    return network.eval()
