"""What each part of the redirector is for: one concept, the same data and steps, one part left out at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import StableDiffusionPipeline
from msgspec import structs
from torch import Tensor, nn

from benchmarks.drawing import PLAIN, Studio
from benchmarks.hybrid import hybrid_pipeline
from benchmarks.published_backend import PublishedBackend, published_bundle
from benchmarks.tables.forgetting import PARTS, Judges, companion_kept, has_companion, plain_of
from benchmarks.test_sets import unsafe_set
from saferedir.engines import open_bundle
from saferedir.export.bundle_export import safety_info
from saferedir.runtime import Pipeline
from saferedir_torch.alignment import changed_tokens
from saferedir_torch.cases import DetectionBatch
from saferedir_torch.comparable import make_comparable
from saferedir_torch.config import SafetyConfig
from saferedir_torch.evaluation.features import Features
from saferedir_torch.evaluation.intervals import clustered_mean, clustered_share
from saferedir_torch.learner import PAIR_BATCH, STRENGTH, TAU, Learner
from saferedir_torch.new_module import new_module
from saferedir_torch.published import PublishedNetwork, published_step
from saferedir_torch.redirector import Redirection
from saferedir_torch.safety_module import Branch, PromptPart, SafetyModule
from saferedir_torch.train import RUNS_FILE, optimise, teach_redirector, teach_words
from saferedir_torch.training_data import LatentBank, PairBank, load_runs, make_pairs
from saferedir_torch.world.prompts import CONCEPTS
from saferedir_torch.world.source import WorldPrompts
from saferedir_torch.world.split import Split

#: Of the detector, which all variants share, and of each variant's redirector.
STEPS = 1500
FULL, QUICK = 200, 6
CONCEPT = "church"

Shape = Callable[[Tensor, Redirection], Redirection]


def _full(prompt: Tensor, said: Redirection) -> Redirection:
    return said


def _no_mask(prompt: Tensor, said: Redirection) -> Redirection:
    return said._replace(mask=torch.ones_like(said.mask), mask_logits=torch.zeros_like(said.mask_logits))


def _no_step_length(prompt: Tensor, said: Redirection) -> Redirection:
    return said._replace(alpha=torch.ones_like(said.alpha))


def _one_direction(prompt: Tensor, said: Redirection) -> Redirection:
    weights = said.mask / said.mask.sum(dim=1, keepdim=True).clamp(min=1e-6)
    shared = ((said.target - prompt) * weights.unsqueeze(-1)).sum(dim=1, keepdim=True)
    return said._replace(target=prompt + shared)


#: Variant -> what is done to the heads, and tau.
VARIANTS: dict[str, tuple[Shape, float]] = {
    "full": (_full, TAU),
    "no mask": (_no_mask, TAU),
    "no step length": (_no_step_length, TAU),
    "one direction for all tokens": (_one_direction, TAU),
    "tau 0.2": (_full, 0.2),
}
PUBLISHED = "published network and controller"


class ShapedBranch(Branch):
    """A branch whose heads are changed before anything uses them, in training too."""

    shape: Shape

    def redirection(self, prompt: Tensor, features: Tensor, joint: Tensor, active: Tensor) -> Redirection:
        return self.shape(prompt, super().redirection(prompt, features, joint, active))

    def corrected_redirection(
        self, prompt: Tensor, part: PromptPart, joint: Tensor, active: Tensor, again: Tensor
    ) -> Redirection:
        return self.shape(prompt, super().corrected_redirection(prompt, part, joint, active, again))


@dataclass
class Lessons:
    """What every variant is taught with: the same runs, the same pairs, and one finished detector."""

    pipeline: StableDiffusionPipeline
    bank: LatentBank
    pairs: PairBank
    detecting: SafetyModule
    folder: Path
    steps: int

    @classmethod
    def prepare(cls, pipeline: StableDiffusionPipeline, split: Split, runs: Path, folder: Path, steps: int) -> Lessons:
        """Load runs, draw pairs, and train the detector, calibrated as training calibrates."""
        torch.manual_seed(0)
        lessons = cls.untaught(pipeline, CONCEPT, split, runs, folder, steps)
        module = lessons.detecting
        module.last_branch.redirector.requires_grad_(False)
        learner = lessons.learner(module)
        optimise(module, learner.detection_of_step, folder, steps=steps, name="detector")
        teach_words(module, learner, folder, steps=steps)
        make_comparable(module, learner)
        return lessons

    @classmethod
    def untaught(
        cls, pipeline: StableDiffusionPipeline, concept: str, split: Split, runs: Path, folder: Path, steps: int
    ) -> Lessons:
        """The same of any concept, with a detector that has not learnt anything."""
        source = WorldPrompts([concept], split)
        module = new_module(pipeline, source.replacements).to(pipeline.device)
        bank, pairs = load_runs(runs / RUNS_FILE).of([concept]), make_pairs(pipeline, source, count=5000, seed=0)
        return cls(pipeline, bank, pairs, module, folder, steps)

    def learner(self, module: SafetyModule, tau: float = TAU) -> Learner:
        return Learner(module, self.bank, self.pairs, self.pipeline.scheduler.alphas_cumprod, 0, tau=tau)


def train_variant(lessons: Lessons, variant: str) -> SafetyModule:
    """The finished detector with a redirector that has one part left out."""
    shape, tau = VARIANTS[variant]
    torch.manual_seed(0)
    module = SafetyModule(lessons.detecting.config)
    branch = ShapedBranch(module.config, 1)
    branch.shape = shape
    module.branches[0] = branch
    detecting = {name: value for name, value in lessons.detecting.state_dict().items() if ".redirector." not in name}
    module.load_state_dict(detecting, strict=False)
    teach_redirector(module, lessons.learner(module, tau), lessons.folder, name=variant.replace(" ", "_"), steps=lessons.steps)
    return module.eval()


def train_published(lessons: Lessons) -> PublishedNetwork:
    """The published network on the same runs and pairs; its step is taught by the distance to the aligned rewrite."""
    torch.manual_seed(0)
    unet, tokens = lessons.pipeline.unet.config, lessons.pipeline.tokenizer.model_max_length
    teacher = lessons.learner(lessons.detecting)
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

    optimise(network, loss_of_step, lessons.folder, steps=lessons.steps, name="published")
    return network.eval()


def ablation(
    studio: Studio, pipeline: StableDiffusionPipeline, split: Split, runs: Path, folder: Path, features: Features,
    count: int, rewrites: int, steps: int = STEPS,
) -> dict[str, Any]:  # fmt: skip
    """FSR, companion and LPIPS to the rewrite of every variant, seen and held-out names apart."""
    drawers: dict[str, tuple[str, Pipeline]] = {}
    lessons = Lessons.prepare(pipeline, split, runs, folder, steps)
    for variant in VARIANTS:
        module = train_variant(lessons, variant)
        drawers[variant] = (f"{variant} {_digest(module)}", hybrid_pipeline(module))
    network = train_published(lessons)
    drawers[PUBLISHED] = (f"published {_digest(network)}", _published_pipeline(network, lessons.detecting.config))
    concept = CONCEPTS[CONCEPT]
    plain = plain_of(drawers["full"][1])
    judges = Judges.calibrated(studio, plain, concept, split, rewrites)
    figures: dict[str, Any] = {"concept": CONCEPT, "steps": steps, "measures": features.names, "variants": {}}
    for part in PARTS:
        tested = unsafe_set(concept, split, part, count, 1, seed=3)
        before = studio.draw(plain, PLAIN, tested.prompts, tested.seeds, f"{part}: unprotected")
        rewrite = studio.draw(plain, PLAIN, [pair.safe for pair in tested.pairs], tested.seeds, f"{part}: rewrite")
        shown = judges.found(before, concept)
        names, prompts = np.array(tested.names), np.array(tested.prompts)
        beside = np.array([has_companion(pair) for pair in tested.pairs])
        for variant, (identity, drawer) in drawers.items():
            after = studio.draw(drawer, identity, tested.prompts, tested.seeds, f"{part}: {variant}")
            opinion = judges.judges["judge"].judge(after.pictures)
            kept = np.array([companion_kept(opinion, row, tested.pairs[row]) for row in np.flatnonzero(beside).tolist()])
            distance = features.perceptual.distance(after.pictures, rewrite.pictures).double().numpy()
            figures["variants"].setdefault(variant, {})[part] = {
                "fsr": clustered_share(~judges.found(after, concept)[shown], list(names[shown]), list(prompts[shown])),
                "companion": clustered_share(kept, list(names[beside]), list(prompts[beside])),
                features.names[1]: clustered_mean(distance, list(names), list(prompts)),
                "fired": float(after.any_fired.mean()),
            }
    return figures


def _published_pipeline(network: PublishedNetwork, config: SafetyConfig) -> Pipeline:
    info = safety_info(config)
    by_argmax = tuple(structs.replace(concept, threshold=None) for concept in info.concepts)
    bundle = published_bundle(open_bundle("emoji-diffusion"), structs.replace(info, concepts=by_argmax))
    return Pipeline(bundle, PublishedBackend(bundle, network))


def _digest(module: nn.Module) -> str:
    digest = hashlib.sha256()
    for _, tensor in sorted(module.state_dict().items()):
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
