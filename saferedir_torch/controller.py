"""The controller: one step of detection, cooldown and redirection for a batch of independent requests.

Branch-free, so that it is exported as it stands: both outcomes are computed and chosen with `where` (a product with 0
would let NaN through). Requests in a batch share nothing.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from saferedir_torch.estimate import shown_estimate
from saferedir_torch.safety_module import SafetyModule


class Policy(NamedTuple):
    """What the operator allows, per request and concept."""

    #: K, steps of rest after firing, [B] int32.
    period: Tensor
    #: Which concepts are looked for, [B, N] bool.
    enabled: Tensor
    #: theta, [B, N].
    threshold: Tensor
    #: s, [B, N]; of the active concepts of one branch the largest is used.
    alpha_scale: Tensor


class State(NamedTuple):
    """What a request carries from step to step."""

    #: p, the prompt embedding in force, [B, T, D].
    prompt: Tensor
    #: k, steps of rest left, [B] int32.
    cooldown: Tensor
    #: Concepts that have fired so far, [B, N] bool; never cleared.
    active: Tensor
    #: False once anything was not finite, [B] bool.
    ok: Tensor

    @classmethod
    def initial(cls, prompt: Tensor, concepts: int) -> State:
        """The state before the first step of requests with original embeddings `prompt` [B, T, D]."""
        batch, device = prompt.shape[0], prompt.device
        return cls(
            prompt=prompt,
            cooldown=torch.zeros(batch, dtype=torch.int32, device=device),
            active=torch.zeros(batch, concepts, dtype=torch.bool, device=device),
            ok=torch.ones(batch, dtype=torch.bool, device=device),
        )


class Verdict(NamedTuple):
    """What a step saw and decided."""

    #: Score per concept, computed in every step, [B, N].
    score: Tensor
    #: Which concepts fired; none while cooling down, [B, N] bool.
    fired: Tensor
    #: m of every token and active concept, zero where nothing is active, [B, N, T].
    token_mask: Tensor


def finite(*tensors: Tensor) -> Tensor:
    """Whether all values of a request are finite, tensors [B, ...] -> [B] bool.

    By the sum of their magnitudes, which is below infinity for no other: two kernels a tensor, where `isfinite` takes eight.
    """
    sums = [torch.linalg.vector_norm(tensor.flatten(1), 1, dim=1, dtype=torch.float32) for tensor in tensors]
    magnitude: Tensor = sum(sums[1:], start=sums[0])
    return magnitude < torch.inf


class Controller(nn.Module):
    """The safety engine: called before every UNet call with what the UNet is about to see."""

    def __init__(self, module: SafetyModule) -> None:
        super().__init__()
        self.module = module

    def forward(
        self,
        latent: Tensor,
        timestep: Tensor,
        original: Tensor,
        state: State,
        policy: Policy,
        denoised: Tensor,
        known: Tensor,
    ) -> tuple[State, Verdict]:
        """latent z [B, C, h, w] after the scheduler's input scaling, timestep [B], original embedding p0 [B, T, D].

        `denoised` [B, C, h, w] is the estimate of the finished picture, a clean latent, that the step before made of its guided
        prediction; `known` [B] bool is false where there is none, as in the first step.
        """
        expected = torch.where(known[:, None, None, None], shown_estimate(denoised), torch.zeros_like(denoised))
        score, together, joint = self.module.score(latent, timestep, state.prompt, expected)
        watching = state.cooldown <= 0
        vigilant = torch.where(state.active, self.module.config.vigilance * policy.threshold, policy.threshold)
        fired = (score >= vigilant) & policy.enabled & watching[:, None]
        any_fired = fired.any(dim=1)
        active = state.active | fired
        again = fired & state.active
        if self.module.config.alone:
            # What shows without the prompt being known to ask for it: none of its tokens is known as one to move.
            again = again | (fired & (together < policy.threshold))
        moved, token_mask = self.module.redirect(original, joint, active, policy.alpha_scale, again)
        prompt = torch.where(any_fired[:, None, None], moved, state.prompt)
        resting = torch.where(watching, state.cooldown, state.cooldown - 1)
        cooldown = torch.where(any_fired, policy.period, resting)
        ok = state.ok & finite(score, prompt, latent, denoised)
        return State(prompt, cooldown, active, ok), Verdict(score, fired, token_mask)
