"""The controller: one step of detection, cooldown and redirection for a batch of independent requests.

Branch-free, so that it is exported as it stands: both outcomes are computed and chosen with `where` (a product with 0
would let NaN through). Requests in a batch share nothing.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from saferedir.engines.step import USUAL_GUIDANCE
from saferedir_torch.detector import Step
from saferedir_torch.estimate import shown_estimate
from saferedir_torch.safety_module import SafetyModule


class Policy(NamedTuple):
    """What the operator allows, per request and concept."""

    #: K, steps of rest after firing, [B] int32.
    period: Tensor
    #: theta, [B, N]; above 1 for a concept that is not looked for.
    threshold: Tensor


class State(NamedTuple):
    """What a request carries from step to step."""

    #: c, the conditioning in force, [B, T, D].
    prompt: Tensor
    #: k, steps of rest left, [B] int32.
    cooldown: Tensor
    #: Concepts that have fired so far, [B, N] bool; never cleared.
    active: Tensor
    #: False once anything was not finite, [B] bool.
    ok: Tensor

    @classmethod
    def initial(cls, prompt: Tensor, concepts: int) -> State:
        """The state before the first step of requests with original conditioning `prompt` [B, T, D]."""
        batch, device = prompt.shape[0], prompt.device
        return cls(
            prompt=prompt,
            cooldown=torch.zeros(batch, dtype=torch.int32, device=device),
            active=torch.zeros(batch, concepts, dtype=torch.bool, device=device),
            ok=torch.ones(batch, dtype=torch.bool, device=device),
        )


class Seen(NamedTuple):
    """What the denoiser is about to see in a step, and what is known by then."""

    #: z after the sampler's input scaling, [B, C, h, w].
    latent: Tensor
    #: Noise share of the step's level, 0 of a clean picture and 1 of noise, [B].
    share: Tensor
    #: The estimate of the finished picture, a clean latent, that the step before made of its guided output; zero where there is
    #: none. [B, C, h, w].
    denoised: Tensor
    #: False where there is none, as in the first step, [B] bool.
    known: Tensor


class Guided(NamedTuple):
    """What the conditioning is guided away from."""

    #: n, the other half of guidance, [B, T, D]; anything finite where there is no guidance.
    negative: Tensor
    #: By how much guidance exceeds the usual scale, `amplification` of it, [B].
    amplification: Tensor


class Verdict(NamedTuple):
    """What a step saw and decided."""

    #: Score per concept in [0, 1], computed in every step, [B, N].
    score: Tensor
    #: Which concepts fired; none while cooling down, [B, N] bool.
    fired: Tensor
    #: m of every token and active concept, zero where nothing is active, [B, N, T].
    token_mask: Tensor


def amplification(guidance_scale: float) -> float:
    """g / 5 - 1 above the usual guidance scale, else 0: guidance draws n + g (c - n), and n + g / 5 (c - n) draws as much of it
    at the usual scale."""
    return max(0.0, guidance_scale / USUAL_GUIDANCE - 1)


class Controller(nn.Module):
    """The safety engine: called before every UNet call with what the UNet is about to see."""

    def __init__(self, module: SafetyModule) -> None:
        super().__init__()
        self.module = module

    def forward(self, seen: Seen, original: Tensor, guided: Guided, state: State, policy: Policy) -> tuple[State, Verdict]:
        """What is seen, the original conditioning c0 [B, T, D], what it is guided away from, the request's state and policy."""
        drawn = state.prompt + guided.amplification[:, None, None] * (state.prompt - guided.negative)
        features = self.module.features(Step(seen.latent, shown_estimate(seen.denoised), seen.share))
        scored = self.module.score(features, seen.known, [drawn], [state.prompt], [original])
        score = torch.sigmoid(scored.statistic)
        watching = state.cooldown <= 0
        fired = (score >= policy.threshold) & watching[:, None]
        any_fired, active, again = fired.any(dim=1), state.active | fired, fired & state.active
        (moved,), token_mask = self.module.redirect(scored, [original], active, again)
        prompt = torch.where(any_fired[:, None, None], moved, state.prompt)
        cooldown = torch.where(any_fired, policy.period, torch.where(watching, state.cooldown, state.cooldown - 1))
        ok = state.ok & finite(score, prompt, seen.latent, seen.denoised)
        return State(prompt, cooldown, active, ok), Verdict(score, fired, token_mask)


def finite(*tensors: Tensor) -> Tensor:
    """Whether all values of a request are finite, tensors [B, ...] -> [B] bool.

    By the sum of their magnitudes, which is below infinity for no other: two kernels a tensor, where `isfinite` takes eight.
    """
    sums = [
        torch.linalg.vector_norm(tensor, 1, dim=tuple(range(1, tensor.dim())), dtype=torch.float32) for tensor in tensors
    ]  # fmt: skip
    magnitude: Tensor = sum(sums[1:], start=sums[0])
    return magnitude < torch.inf
