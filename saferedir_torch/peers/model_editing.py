"""Peers that change the model for good: UCE in closed form, and ESD by training."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from saferedir_torch.peers.peer import Peer
from saferedir_torch.trajectories import initial_noise, sample


def cross_attention_projections(unet: Any, names: Sequence[str]) -> Iterator[nn.Linear]:
    """The linear layers of the cross-attention called one of `names` (to_k, to_v, ...)."""
    for path, layer in unet.named_modules():
        if isinstance(layer, nn.Linear) and ".attn2." in path and any(f".attn2.{name}" in path for name in names):
            yield layer


class UnifiedConceptEditing(Peer):
    """Keys and values of the cross-attention edited in closed form (UCE; Gandikota et al. 2024, arXiv 2308.14761, equation 7).

    With c the tokens of prompts that ask for the concept, c* those of their rewrites and k those to preserve:

        W = (sum W0 c* c^T + sum W0 k k^T + lambda W0) (sum c c^T + sum k k^T + lambda I)^-1
    """

    name = "UCE"

    def __init__(
        self,
        pipeline: Any,
        erased: Sequence[tuple[str, str]],
        preserved: Sequence[str],
        *,
        erase_scale: float = 1.0,
        preserve_scale: float = 1.0,
        ridge: float = 0.1,
        **drawing: Any,
    ) -> None:
        """`erased` are prompts that ask for the concept, with what they are to mean; `preserved` are to mean what they do."""
        super().__init__(pipeline, **drawing)
        self.unet = copy.deepcopy(pipeline.unet)
        unsafe = self.encode([prompt for prompt, _ in erased]).flatten(0, 1).double()
        safe = self.encode([rewrite for _, rewrite in erased]).flatten(0, 1).double()
        kept = self.encode(preserved).flatten(0, 1).double()
        unit = ridge * torch.eye(unsafe.shape[1], dtype=torch.float64, device=unsafe.device)
        moved = erase_scale * safe.T @ unsafe + preserve_scale * kept.T @ kept + unit
        old = erase_scale * unsafe.T @ unsafe + preserve_scale * kept.T @ kept + unit
        change = torch.linalg.solve(old, moved, left=False).float()  # moved old^-1
        with torch.no_grad():
            for layer in cross_attention_projections(self.unet, ("to_k", "to_v")):
                layer.weight.copy_(layer.weight @ change)


class ErasedStableDiffusion(Peer):
    """The cross-attention trained to predict away from the concept (ESD-x; Gandikota et al. 2023, arXiv 2303.07345).

        | e(x_t, c, t) - (e0(x_t, t) - eta (e0(x_t, c, t) - e0(x_t, t))) |^2

    with e0 the frozen model. The paper draws x_t with the model being trained; here it is of runs of the frozen one.
    """

    name = "ESD"

    def __init__(
        self,
        pipeline: Any,
        prompts: Sequence[str],
        *,
        eta: float = 1.0,
        iterations: int = 1000,
        rate: float = 1e-5,
        batch: int = 8,
        seed: int = 0,
        on_step: Callable[[int, float], None] | None = None,
        **drawing: Any,
    ) -> None:
        """`prompts` ask for the concept; one run is recorded for each."""
        super().__init__(pipeline, **drawing)
        self.unet = copy.deepcopy(pipeline.unet)
        layers = [*cross_attention_projections(self.unet, ("to_q", "to_k", "to_v", "to_out"))]
        self.unet.requires_grad_(False)
        for layer in layers:
            layer.requires_grad_(True)
        embeds, empty = self.encode(prompts), self.encode([""])
        runs = sample(
            pipeline, embeds.cpu(), empty.cpu(), initial_noise(pipeline, [seed + row for row in range(len(prompts))]),
            steps=self.steps, guidance_scale=self.guidance_scale,
        )  # fmt: skip
        optimiser = torch.optim.Adam((weight for layer in layers for weight in layer.parameters()), lr=rate)
        generator = torch.Generator().manual_seed(seed)
        device = pipeline.device
        for step in range(iterations):
            row = torch.randint(len(prompts), (batch,), generator=generator)
            at = torch.randint(self.steps, (batch,), generator=generator)
            latent, timestep = runs.latents[row, at].float().to(device), runs.timesteps[at].to(device)
            concept = embeds[row.to(device)]
            with torch.no_grad():
                wanted = self._wanted(pipeline.unet, latent, timestep, concept, empty.expand(batch, -1, -1), eta)
            loss = (self.unet(latent, timestep, concept, return_dict=False)[0] - wanted).square().mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            if on_step is not None:
                on_step(step, float(loss.detach()))
        self.unet.requires_grad_(False)

    @staticmethod
    def _wanted(unet: Any, latent: Tensor, timestep: Tensor, concept: Tensor, empty: Tensor, eta: float) -> Tensor:
        both: Tensor = unet(torch.cat([latent] * 2), torch.cat([timestep] * 2), torch.cat([empty, concept]), return_dict=False)[
            0
        ]
        without, conditional = both.chunk(2)
        return without - eta * (conditional - without)
