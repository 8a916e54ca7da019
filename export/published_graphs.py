"""Engines of the compatibility mode: the published network bare, its controller, and steps that call it after the UNet."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from saferedir.export.engine_graph import (
    DRAWN_OUTPUTS,
    EXAMPLE_BATCH,
    STATE_OUTPUTS,
    VERDICT_OUTPUTS,
    Graph,
    graph,
    step_example,
)
from saferedir.export.model_graphs import PlainStepGraph, model_graphs, per_request
from saferedir_torch.published import PublishedNetwork
from saferedir_torch.published_controller import PublishedController, PublishedPolicy, PublishedState

#: Side of the latent in examples, where no model states one.
EXAMPLE_SIZE = 16
NETWORK_OUTPUTS = ("logits", "delta", "mask", "alpha")
#: What a request carries where guidance moves both halves.
PAIR_OUTPUTS = ("next_prompt", "next_negative", *STATE_OUTPUTS[1:])


class PublishedNetworkGraph(nn.Module):
    """The network alone: latent [B, C, h, w], prompt_embeds [B, T, D], timestep [B] -> logits, delta, mask, alpha."""

    def __init__(self, network: PublishedNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, latent: Tensor, prompt_embeds: Tensor, timestep: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.network(latent, prompt_embeds, timestep))


class PublishedSafetyGraph(nn.Module):
    """The controller alone: what the UNet has just seen, and the request's state, in and out."""

    def __init__(self, controller: PublishedController) -> None:
        super().__init__()
        self.controller = controller

    def forward(
        self,
        latent: Tensor,
        timestep: Tensor,
        prompt: Tensor,
        negative: Tensor,
        original: Tensor,
        original_negative: Tensor,
        cooldown: Tensor,
        period: Tensor,
        active: Tensor,
        ok: Tensor,
        enabled: Tensor,
        alpha_scale: Tensor,
    ) -> tuple[Tensor, ...]:
        state, verdict = self.controller(
            latent,
            timestep,
            original,
            original_negative,
            PublishedState(prompt, negative, cooldown, active, ok),
            PublishedPolicy(period, enabled, alpha_scale),
        )
        return (*state, *verdict)


class PublishedStepGraph(nn.Module):
    """A guided step: UNet, guidance and scheduler update with the embeddings in force, then the controller for the next."""

    def __init__(self, controller: PublishedController, unet: nn.Module) -> None:
        super().__init__()
        self.controller = controller
        self.denoiser = PlainStepGraph(unet, guided=True)

    def forward(
        self,
        latent: Tensor,
        timestep: Tensor,
        input_scale: Tensor,
        coefficients: Tensor,
        history: Tensor,
        noise: Tensor,
        negative: Tensor,
        guidance_scale: Tensor,
        prompt: Tensor,
        original: Tensor,
        original_negative: Tensor,
        cooldown: Tensor,
        period: Tensor,
        active: Tensor,
        ok: Tensor,
        enabled: Tensor,
        alpha_scale: Tensor,
    ) -> tuple[Tensor, ...]:
        moved, model_output = self.denoiser(
            latent, timestep, input_scale, coefficients, history, noise, negative, guidance_scale, prompt
        )
        state, verdict = self.controller(
            latent * per_request(input_scale),
            timestep,
            original,
            original_negative,
            PublishedState(prompt, negative, cooldown, active, ok & _finite(moved)),
            PublishedPolicy(period, enabled, alpha_scale),
        )
        return (moved, model_output, *state, *verdict)


class PublishedUnguidedStepGraph(nn.Module):
    """The same without guidance: there is one half, and it moves."""

    def __init__(self, controller: PublishedController, unet: nn.Module) -> None:
        super().__init__()
        self.controller = controller
        self.denoiser = PlainStepGraph(unet, guided=False)

    def forward(
        self,
        latent: Tensor,
        timestep: Tensor,
        input_scale: Tensor,
        coefficients: Tensor,
        history: Tensor,
        noise: Tensor,
        prompt: Tensor,
        original: Tensor,
        cooldown: Tensor,
        period: Tensor,
        active: Tensor,
        ok: Tensor,
        enabled: Tensor,
        alpha_scale: Tensor,
    ) -> tuple[Tensor, ...]:
        moved, model_output = self.denoiser(
            latent, timestep, input_scale, coefficients, history, noise, prompt, input_scale, prompt
        )
        state, verdict = self.controller(
            latent * per_request(input_scale),
            timestep,
            original,
            None,
            PublishedState(prompt, None, cooldown, active, ok & _finite(moved)),
            PublishedPolicy(period, enabled, alpha_scale),
        )
        return (moved, model_output, state.prompt, *state[2:], *verdict)


def published_graphs(pipeline: Any | None, network: PublishedNetwork, *, mask_again: bool) -> dict[str, Graph]:
    """Every engine of the compatibility mode, and the UNet that steps call; those of the safety alone without a pipeline."""
    controller = PublishedController(network, mask_again=mask_again)
    size = EXAMPLE_SIZE if pipeline is None else pipeline.unet.config.sample_size
    channels, (_, tokens, width) = network.channels, network.pos_embed.shape
    latent = torch.randn(EXAMPLE_BATCH, channels, size, size)
    example = step_example(latent, torch.randn(EXAMPLE_BATCH, tokens, width), concepts=1)
    example |= {"prompt_embeds": example["prompt"], "original_negative": example["negative"].clone()}
    if pipeline is None:
        # The network pools over the picture, so that its engines take a latent of any size.
        any_size = {"latent": {2: "height", 3: "width"}}
        return {
            "safety": graph(PublishedSafetyGraph(controller), example, (*PAIR_OUTPUTS, *VERDICT_OUTPUTS), any_size),
            "published_network": graph(PublishedNetworkGraph(network), example, NETWORK_OUTPUTS, any_size),
        }
    guided, unguided = PublishedStepGraph(controller, pipeline.unet), PublishedUnguidedStepGraph(controller, pipeline.unet)
    steps = {
        "step": graph(guided, example, (*DRAWN_OUTPUTS, *PAIR_OUTPUTS, *VERDICT_OUTPUTS)),
        "step_unguided": graph(unguided, example, (*DRAWN_OUTPUTS, *STATE_OUTPUTS, *VERDICT_OUTPUTS)),
    }
    return model_graphs(pipeline) | steps


def _finite(latent: Tensor) -> Tensor:
    return torch.isfinite(latent).flatten(1).all(dim=1)
