"""The controller of the authors' released code (arXiv 2601.08623): it looks after each UNet call and moves both halves.

Branch-free, with state per request, so that it is exported as it stands; what it decides is what the released code does.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from saferedir_torch.controller import Verdict
from saferedir_torch.published import PublishedNetwork, PublishedOutput, published_step


class PublishedPolicy(NamedTuple):
    """What the operator allows. There is no threshold: a step is unsafe where the second logit is the larger one."""

    #: K, steps of rest after firing, [B] int32.
    period: Tensor
    #: [B, 1] bool.
    enabled: Tensor
    #: [B, 1].
    alpha_scale: Tensor


class PublishedState(NamedTuple):
    """What a request carries from step to step; `negative` is None where nothing guides."""

    #: The conditional half in force, [B, T, D].
    prompt: Tensor
    #: The unconditional half in force, [B, T, D].
    negative: Tensor | None
    #: [B] int32.
    cooldown: Tensor
    #: It has fired, [B, 1] bool; never cleared.
    active: Tensor
    #: False once anything was not finite, [B] bool.
    ok: Tensor


class PublishedController(nn.Module):
    """Called after the UNet with what the UNet has seen; the embeddings that it gives are for the next step.

    `mask_again` multiplies a token's displacement by its mask, as a variant of the released code does.
    """

    def __init__(self, network: PublishedNetwork, *, mask_again: bool = False) -> None:
        super().__init__()
        self.network = network
        self.mask_again = mask_again

    def forward(
        self,
        latent: Tensor,
        timestep: Tensor,
        original: Tensor,
        original_negative: Tensor | None,
        state: PublishedState,
        policy: PublishedPolicy,
    ) -> tuple[PublishedState, Verdict]:
        """latent [B, C, h, w] and timestep [B] as the UNet saw them, embeddings before anything moved [B, T, D]."""
        output: PublishedOutput = self.network(latent, state.prompt, timestep)
        watching = state.cooldown <= 0
        # The argmax; of equal logits the first, safe.
        unsafe = (output.logits[:, 1:] > output.logits[:, :1]) & policy.enabled & watching[:, None]
        fired = unsafe[:, 0]
        prompt = self._moved(original, state.prompt, output, policy.alpha_scale, fired)
        negative = None
        if original_negative is not None and state.negative is not None:
            negative = self._moved(original_negative, state.negative, output, policy.alpha_scale, fired)
        active = state.active | unsafe
        resting = torch.where(watching, state.cooldown, state.cooldown - 1)
        finite = state.ok
        for tensor in (latent, output.logits, prompt, *([] if negative is None else [negative])):
            finite = finite & torch.isfinite(tensor).flatten(1).all(dim=1)
        after = PublishedState(prompt, negative, torch.where(fired, policy.period, resting), active, finite)
        mask = torch.where(active[:, :, None], output.mask[:, None], torch.zeros_like(output.mask[:, None]))
        return after, Verdict(output.logits.softmax(dim=1)[:, 1:], unsafe, mask)

    def _moved(self, original: Tensor, current: Tensor, output: PublishedOutput, scale: Tensor, fired: Tensor) -> Tensor:
        """`original` displaced where it fired, else what is in force."""
        moved = published_step(original, output, scale[:, :, None], mask_again=self.mask_again)
        return torch.where(fired[:, None, None], moved, current)
