"""What a gradient attack makes small: unlikeness of texts, or of what a protected model predicts and what it should not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from saferedir_torch.detector import Step
from saferedir_torch.estimate import shown_estimate
from saferedir_torch.safety_module import SafetyModule, StepFeatures
from saferedir_torch.trajectories import encode, initial_noise, sample


class TextUnlikeness:
    """1 - cosine of the mean token embeddings of prompts and of the ones whose meaning they should have.

    The attacker knows the text encoder, and neither the model nor its safety.
    """

    def __init__(self, targets: Tensor) -> None:
        """`targets` [P, T, D], one a prompt that is searched."""
        self._targets = targets.mean(dim=1)[:, None]

    def __call__(self, embeds: Tensor) -> Tensor:
        """[P, M, T, D] -> [P, M]."""
        return 1 - torch.nn.functional.cosine_similarity(embeds.mean(dim=2), self._targets, dim=2)


class ProtectedUnlikeness:
    """How far the noise that the protected model predicts is from what it predicts for unsafe prompts without safety.

    White box: the attacker has the UNet, the detector, the redirector and the thresholds. Decisions are hard, so the gate is
    soft: p = p0 + g (redirect(p0) - p0), g the sigmoid of the largest margin by which any concept's logit has passed its
    threshold so far, in units of `temperature`. The detector's own margin is added with `detector_weight`, so that there is
    a way down where the gate is shut. Steps of one run a prompt are compared, at latents that the unsafe prompt itself leads
    to.

    With `module` None the model is unprotected: what an attacker does who knows of no safety.
    """

    def __init__(
        self,
        pipeline: Any,
        module: SafetyModule | None,
        prompts: Sequence[str],
        seeds: Sequence[int],
        *,
        at: tuple[int, ...] = (0, 4, 9, 15),
        steps: int = 25,
        guidance_scale: float = 5.0,
        temperature: float = 1.0,
        detector_weight: float = 0.02,
    ) -> None:
        """`prompts` are the P unsafe ones, `at` the K steps of their runs of `steps` that are compared, in order."""
        self.unet, self.module = pipeline.unet, module
        self.temperature, self.detector_weight = temperature, detector_weight
        _, embeds = encode(pipeline, [*prompts, ""])
        run = sample(
            pipeline, embeds[:-1], embeds[-1:], initial_noise(pipeline, list(seeds)), steps=steps, guidance_scale=guidance_scale
        )
        chosen = list(at)
        device = pipeline.device
        #: [P, T, D].
        self.target = embeds[:-1].to(device)
        self._latents = run.latents[:, chosen].float().to(device)  # [P, K, C, h, w]
        self._timesteps = run.timesteps[chosen].to(device)  # [K]
        with torch.no_grad():
            if module is not None:
                ahead = shown_estimate(run.denoised[:, chosen].flatten(0, 1))
                seen = Step(self._steps(1)[0], ahead.to(device), run.shares[chosen].to(device).repeat(len(self.target)))
                self._features = module.features(seen)
                self._known = torch.tensor([step > 0 for step in chosen], device=device)
            self._wanted = self._predict(self._every_step(self.target[:, None])).view_as(self._latents)
            nothing = self._predict(self._every_step(embeds[-1:].to(device).expand(len(self.target), -1, -1)[:, None]))
            off = (self._wanted - nothing.view_as(self._wanted)).square()
            self._scale = off.flatten(1).mean(dim=1)  # [P]

    def __call__(self, embeds: Tensor) -> Tensor:
        """p0 [P, M, T, D] -> [P, M]; 0 is what the unsafe prompt draws, 1 as far off as the empty prompt."""
        repeated = self._every_step(embeds)
        if self.module is None:
            return self._unlikeness(repeated)
        shape = (*embeds.shape[:2], len(self._timesteps))
        known = self._known.repeat(shape[0] * shape[1])
        scored = self.module.score(self._features_of(shape[1]), known, [repeated], [repeated], [repeated])
        thresholds = torch.tensor([concept.threshold for concept in self.module.config.concepts], device=repeated.device)
        margins = scored.statistic - torch.logit(thresholds)
        passed = margins.amax(dim=1).view(shape)
        gate = torch.sigmoid(passed / self.temperature).cummax(dim=2).values.view(-1, 1, 1)
        # As if all that may fire had: the gate says how much of it counts.
        may = (margins.detach().view(*shape, -1) >= -self.temperature).any(dim=2, keepdim=True)
        active = may.expand(*shape, -1).flatten(0, 2)
        (moved,) = self.module.redirect(scored, [repeated], active, torch.zeros_like(active)).streams
        seen = repeated + gate * (moved - repeated)
        detected = torch.relu(passed + self.temperature).mean(dim=2)
        return self._unlikeness(seen) + self.detector_weight * detected

    def _features_of(self, variants: int) -> StepFeatures:
        """Features of the steps for so many variants of every prompt, P * M * K of them, every one twice."""

        def repeated(part: Tensor) -> Tensor:
            every = part.view(*self._latents.shape[:2], -1)
            return every[:, None].expand(-1, variants, -1, -1).flatten(0, 2)

        joint = repeated(self._features.joint[: len(self._features.bends)])
        return StepFeatures(torch.cat([joint, joint]), repeated(self._features.bends))

    def _unlikeness(self, seen: Tensor) -> Tensor:
        prompts, *rest = self._latents.shape
        predicted = self._predict(seen).view(prompts, -1, *rest)  # [P, M, K, C, h, w]
        return (predicted - self._wanted[:, None]).square().flatten(2).mean(dim=2) / self._scale[:, None]

    def _predict(self, repeated: Tensor) -> Tensor:
        """Embeddings of all prompts, variants and steps [P * M * K, T, D] -> noise [P * M * K, C, h, w]."""
        variants = len(repeated) // (self._latents.shape[0] * self._latents.shape[1])
        predicted: Tensor = self.unet(*self._steps(variants), repeated, return_dict=False)[0]
        return predicted

    def _steps(self, variants: int) -> tuple[Tensor, Tensor]:
        """Latents and timesteps for so many variants of every prompt, [P * M * K, ...]."""
        prompts = len(self._latents)
        latents = self._latents[:, None].expand(-1, variants, -1, -1, -1, -1).flatten(0, 2)
        return latents, self._timesteps.repeat(prompts * variants)

    def _every_step(self, embeds: Tensor) -> Tensor:
        """[P, M, T, D] -> [P * M * K, T, D]."""
        return embeds.flatten(0, 1).repeat_interleave(len(self._timesteps), dim=0)
