"""The published network, taught by the runs and pairs that the method here learns from, to stand beside it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import StableDiffusionPipeline
from torch import Tensor

from saferedir_torch.alignment import changed_tokens
from saferedir_torch.cases import DetectionBatch
from saferedir_torch.learner import PAIR_BATCH, STRENGTH, TAU, Learner
from saferedir_torch.new_module import new_module
from saferedir_torch.published import PublishedNetwork, published_step
from saferedir_torch.train import RUNS_FILE, optimise
from saferedir_torch.training_data import load_runs, make_pairs
from saferedir_torch.world.source import WorldPrompts
from saferedir_torch.world.split import Split

STEPS = 1500


def train_published(
    pipeline: StableDiffusionPipeline, concept: str, split: Split, runs: Path, folder: Path, steps: int = STEPS
) -> PublishedNetwork:
    """Its step is taught by the distance to the aligned rewrite; `runs` is the folder of a training, `folder` for this one."""
    source = WorldPrompts([concept], split)
    untaught = new_module(pipeline, source.replacements).to(pipeline.device)
    bank, pairs = load_runs(runs / RUNS_FILE).of([concept]), make_pairs(pipeline, source, count=5000, seed=0)
    teacher = Learner(untaught, bank, pairs, pipeline.scheduler.alphas_cumprod, 0, tau=TAU)
    torch.manual_seed(0)
    unet, tokens = pipeline.unet.config, pipeline.tokenizer.model_max_length
    bank, pairs, device = teacher.bank, teacher.pairs, teacher.device
    network = PublishedNetwork(tokens=tokens, width=unet.cross_attention_dim, channels=unet.in_channels).to(device)
    unsafe = teacher.train_pairs[pairs.replaced[teacher.train_pairs, 0] > 0]

    def loss_of_step(step: int) -> tuple[Tensor, dict[str, float]]:
        batch = DetectionBatch(*(tensor.to(device) for tensor in teacher.detection_batch(step)))
        logits = network(batch.latent, batch.prompt, batch.timestep).logits
        labels, known = batch.labels[:, 0].long(), batch.weights[:, 0] > 0
        detected = F.cross_entropy(logits[known], labels[known])
        rng = np.random.default_rng([0, 35, step])
        chosen = unsafe[torch.from_numpy(rng.integers(len(unsafe), size=PAIR_BATCH))]
        shown = teacher.train_rows[torch.from_numpy(rng.integers(len(teacher.train_rows), size=PAIR_BATCH))]
        original, target = (side[chosen].to(device).float() for side in (pairs.original, pairs.target))
        output = network(bank.latent[shown].to(device).float(), original, bank.timestep[shown].to(device))
        mask = changed_tokens(original, target, TAU)
        norm = original.norm(dim=-1).clamp(min=1e-6)
        distance = ((published_step(original, output, STRENGTH) - target).norm(dim=-1) / norm).square()
        with torch.autocast(device.type, enabled=False):  # logarithms of shares, in full precision
            masked = F.binary_cross_entropy(output.mask.float().clamp(1e-6, 1 - 1e-6), mask)
        moved = distance.mean() + (distance * mask).sum() / mask.sum().clamp(min=1)
        return detected + masked + 2 * moved, {"detection": float(detected.detach()), "moved": float(moved.detach())}

    optimise(network, loss_of_step, folder, steps=steps, name="published")
    return network.eval()
