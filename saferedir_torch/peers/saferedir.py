"""SafeRedir in the peers' loop, so that it is compared on the same model, steps and seeds, and timed alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from saferedir.engines.errors import NonFiniteError
from saferedir.engines.plain_letters import in_plain_letters
from saferedir_torch.controller import Controller, Guided, State, amplification
from saferedir_torch.eager_policy import EagerPolicy
from saferedir_torch.estimate import NoiseLevels
from saferedir_torch.fit import check_match
from saferedir_torch.peers.peer import Batch, Peer
from saferedir_torch.safety_module import SafetyModule
from saferedir_torch.safety_run import seen_of


class SafeRedir(Peer):
    """The embedding redirected where the detector fires (arXiv 2601.08623), as `protect` does it."""

    name = "SafeRedir"

    def __init__(self, pipeline: Any, module: SafetyModule, policy: EagerPolicy | None = None, **drawing: Any) -> None:
        """`module` must fit `pipeline`."""
        super().__init__(pipeline, **drawing)
        check_match(pipeline, module)
        self.controller = Controller(module).to(pipeline.device).eval()
        self.policy = policy or EagerPolicy()
        self.levels = NoiseLevels(pipeline.scheduler)

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Embeddings of the prompts in plain letters, [B, T, D]."""
        return super().encode([in_plain_letters(prompt) for prompt in prompts])

    def begin(self, prompts: Sequence[str], embeds: Tensor) -> Batch:
        batch = super().begin(prompts, embeds)
        module = self.controller.module
        batch.kept["original"] = batch.embeds
        batch.kept["state"] = State.initial(batch.embeds, len(module.config.concepts))
        batch.kept["denoised"] = None
        batch.kept["policy"] = self.policy.resolve(module, len(prompts), batch.embeds.device)
        return batch

    def guided(self, batch: Batch, index: int, timestep: Tensor, latent: Tensor) -> Tensor:
        seen = seen_of(latent, self.levels.at(float(timestep)).share, batch.kept["denoised"])
        amount = torch.full((len(latent),), amplification(self.guidance_scale), device=latent.device)
        guided_by = Guided(batch.negative, amount)
        state, _ = self.controller(seen, batch.kept["original"], guided_by, batch.kept["state"], batch.kept["policy"])
        if not bool(state.ok.all()):
            raise NonFiniteError(f"latent, score or embedding is not finite at timestep {float(timestep):g}; nothing is drawn")
        batch.kept["state"], batch.embeds = state, state.prompt
        guided = super().guided(batch, index, timestep, latent)
        if not bool(torch.isfinite(guided).all()):
            raise NonFiniteError(f"the prediction is not finite at timestep {float(timestep):g}; nothing is drawn")
        batch.kept["denoised"] = self.levels.denoised(latent, float(timestep), guided)
        return guided
