"""What a gradient attack makes small: unlikeness of texts, or of what a protected model predicts and what it should not."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from saferedir_torch.safety_module import SafetyModule
from saferedir_torch.trajectories import encode, initial_noise, sample


class TextUnlikeness:
    """1 - cosine of the mean token embeddings of a prompt and of the one whose meaning it should have.

    The attacker knows the text encoder, and neither the model nor its safety.
    """

    def __init__(self, target: Tensor) -> None:
        """`target` [1, T, D]."""
        self._target = target.mean(dim=1)

    def __call__(self, embeds: Tensor) -> Tensor:
        """[N, T, D] -> [N]."""
        return 1 - torch.nn.functional.cosine_similarity(embeds.mean(dim=1), self._target, dim=1)


class ProtectedUnlikeness:
    """How far the noise that the protected model predicts is from what it predicts for the unsafe prompt without safety.

    White box: the attacker has the UNet, the detector, the redirector and the thresholds. Decisions are hard, so the gate is
    soft: p = p0 + g (redirect(p0) - p0), g the sigmoid of the largest margin by which any concept's logit has passed its
    threshold so far, in units of `temperature`. The detector's own margin is added with `detector_weight`, so that there is
    a way down where the gate is shut. Steps of one run are compared, at latents that the unsafe prompt itself leads to.

    With `module` None the model is unprotected: what an attacker does who knows of no safety.
    """

    def __init__(
        self,
        pipeline: Any,
        module: SafetyModule | None,
        prompt: str,
        seed: int,
        *,
        at: tuple[int, ...] = (0, 4, 9, 15),
        steps: int = 25,
        guidance_scale: float = 5.0,
        temperature: float = 1.0,
        detector_weight: float = 0.02,
    ) -> None:
        """`prompt` is the unsafe one, `at` the steps of its run of `steps` that are compared, in order."""
        self.unet, self.module = pipeline.unet, module
        self.temperature, self.detector_weight = temperature, detector_weight
        _, embeds = encode(pipeline, [prompt, ""])
        run = sample(
            pipeline, embeds[:1], embeds[1:], initial_noise(pipeline, [seed]), steps=steps, guidance_scale=guidance_scale
        )
        chosen = list(at)
        device = pipeline.device
        self.target = embeds[:1].to(device)
        self.latents = run.latents[0, chosen].float().to(device)  # [K, C, h, w]
        self.timesteps = run.timesteps[chosen].to(device)  # [K]
        with torch.no_grad():
            self._wanted = self._predict(self.target.expand(len(chosen), -1, -1), 1)
            nothing = self._predict(embeds[1:].to(device).expand(len(chosen), -1, -1), 1)
            self._scale = (self._wanted - nothing).square().mean()

    def __call__(self, embeds: Tensor) -> Tensor:
        """p0 [N, T, D] -> [N]; 0 is what the unsafe prompt draws, 1 as far off as the empty prompt."""
        count, steps = len(embeds), len(self.timesteps)
        repeated = embeds.repeat_interleave(steps, dim=0)  # [N * K, T, D]
        if self.module is None:
            return self._unlikeness(repeated, count)
        margins, joint = self._margins(repeated, count)
        passed = margins.amax(dim=1).view(count, steps)
        gate = torch.sigmoid(passed / self.temperature).cummax(dim=1).values.view(-1, 1, 1)
        # As if all that may fire had: the gate says how much of it counts.
        active = (margins.detach().view(count, steps, -1) >= -self.temperature).any(dim=1).repeat_interleave(steps, dim=0)
        scales = torch.tensor([concept.alpha_scale for concept in self.module.config.concepts], device=embeds.device)
        moved = self.module.redirect(repeated, joint, active, scales.expand(len(repeated), -1), torch.zeros_like(active)).prompt
        seen = repeated + gate * (moved - repeated)
        detected = torch.relu(passed + self.temperature).mean(dim=1)
        return self._unlikeness(seen, count) + self.detector_weight * detected

    def _margins(self, repeated: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """By how much each concept's logit passes its threshold [N * K, concepts], and j."""
        assert self.module is not None
        latents, timesteps = self._steps(count)
        joint = self.module.encoder(latents, timesteps)
        parts = [branch.comparable(branch.logits(joint, repeated), timesteps) for branch in self.module.each_branch()]
        thresholds = torch.tensor([concept.threshold for concept in self.module.config.concepts], device=repeated.device)
        return torch.cat(parts, dim=1) - torch.logit(thresholds), joint

    def _unlikeness(self, seen: Tensor, count: int) -> Tensor:
        off = (self._predict(seen, count) - self._wanted.repeat(count, 1, 1, 1)).square().flatten(1).mean(dim=1)
        return off.view(count, -1).mean(dim=1) / self._scale

    def _predict(self, prompts: Tensor, count: int) -> Tensor:
        latents, timesteps = self._steps(count)
        predicted: Tensor = self.unet(latents, timesteps, prompts, return_dict=False)[0]
        return predicted

    def _steps(self, count: int) -> tuple[Tensor, Tensor]:
        return self.latents.repeat(count, 1, 1, 1), self.timesteps.repeat(count)
