"""SafeRedir as the authors released it, network and controller, in the peers' loop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from saferedir.engines.errors import NonFiniteError
from saferedir_torch.peers.peer import Batch, Peer
from saferedir_torch.published import PublishedNetwork
from saferedir_torch.published_controller import PublishedController, PublishedPolicy, PublishedState


class PublishedSafeRedir(Peer):
    """Both halves moved after a step that the network finds unsafe (arXiv 2601.08623, the released code).

    The network looks at what the UNet has seen, so that the first step is unprotected.
    """

    name = "published SafeRedir"

    def __init__(
        self, pipeline: Any, network: PublishedNetwork, *, alpha_scale: float = 1.5, period: int = 2, **drawing: Any
    ) -> None:
        """`network` must fit `pipeline`; `period` is K, the steps of rest after it fired."""
        super().__init__(pipeline, **drawing)
        self.controller = PublishedController(network.to(pipeline.device).eval())
        self.alpha_scale, self.period = alpha_scale, period

    def begin(self, prompts: Sequence[str], embeds: Tensor) -> Batch:
        batch = super().begin(prompts, embeds)
        count, device = len(embeds), embeds.device
        batch.kept["original"] = batch.embeds, batch.negative
        batch.kept["state"] = PublishedState(
            batch.embeds, batch.negative, torch.zeros(count, dtype=torch.int32, device=device),
            torch.zeros(count, 1, dtype=torch.bool, device=device), torch.ones(count, dtype=torch.bool, device=device),
        )  # fmt: skip
        batch.kept["policy"] = PublishedPolicy(
            torch.full((count,), self.period, dtype=torch.int32, device=device),
            torch.ones(count, 1, dtype=torch.bool, device=device), torch.full((count, 1), self.alpha_scale, device=device),
        )  # fmt: skip
        return batch

    def guided(self, batch: Batch, index: int, timestep: Tensor, latent: Tensor) -> Tensor:
        guided = super().guided(batch, index, timestep, latent)
        time = timestep.to(latent).expand(len(latent))
        state, _ = self.controller(latent, time, *batch.kept["original"], batch.kept["state"], batch.kept["policy"])
        if not bool(state.ok.all()):
            raise NonFiniteError(f"something is not finite at timestep {float(timestep):g}; nothing is drawn")
        batch.kept["state"], batch.embeds, batch.negative = state, state.prompt, state.negative
        return guided
