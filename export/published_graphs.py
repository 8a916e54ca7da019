"""Engines of the compatibility mode: the published network bare, its controller, and steps that call it after the UNet."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from saferedir.engines.step import Form, engine_outputs
from saferedir.export.engine_graph import EXAMPLE_BATCH, Graph, StepModule, graph, step_example, step_graph
from saferedir.export.model_graphs import PlainStepGraph, model_graphs
from saferedir.export.safety_graphs import named
from saferedir_torch.controller import finite
from saferedir_torch.published import PublishedNetwork
from saferedir_torch.published_controller import PublishedController, PublishedPolicy, PublishedState

#: Side of the latent in examples, where no model states one.
EXAMPLE_SIZE = 16


class PublishedNetworkGraph(nn.Module):
    """The network alone: latent [B, C, h, w], prompt_embeds [B, T, D], timestep [B] -> logits, delta, mask, alpha."""

    def __init__(self, network: PublishedNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, latent: Tensor, prompt_embeds: Tensor, timestep: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.network(latent, prompt_embeds, timestep))


class PublishedSafetyGraph(StepModule):
    """The controller alone: what the UNet has just seen, and the request's state, in and out."""

    def __init__(self, controller: PublishedController, form: Form = Form.PUBLISHED_SAFETY) -> None:
        super().__init__(form)
        self.controller = controller

    def compute(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        # Without guidance there is no other half.
        state, verdict = self.controller(
            *(tensors[name] for name in ("latent", "timestep", "original")),
            tensors.get("original_negative"),
            PublishedState(*(tensors.get(name) for name in PublishedState._fields)),  # type: ignore[arg-type]
            PublishedPolicy(*(tensors[name] for name in PublishedPolicy._fields)),
        )
        return named(state, verdict)


class PublishedStepGraph(PublishedSafetyGraph):
    """A step: UNet, guidance and scheduler update with the embeddings in force, then the controller for the next.

    Without guidance there is one half of the embeddings, and it moves.
    """

    def __init__(self, controller: PublishedController, unet: nn.Module, *, guided: bool) -> None:
        super().__init__(controller, Form.PUBLISHED if guided else Form.PUBLISHED_UNGUIDED)
        self.denoiser = PlainStepGraph(unet, guided=guided)

    def compute(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        seen = tensors["latent"] * tensors["input_scale"]
        drawn = self.denoiser.drawn(tensors, seen)
        ok = tensors["ok"] & finite(drawn["next_latent"])
        return super().compute(tensors | {"latent": seen, "ok": ok}) | drawn


def published_graphs(pipeline: Any | None, network: PublishedNetwork, *, mask_again: bool) -> dict[str, Graph]:
    """Every engine of the compatibility mode, and the UNet that steps call; those of the safety alone without a pipeline."""
    controller = PublishedController(network, mask_again=mask_again)
    size = EXAMPLE_SIZE if pipeline is None else pipeline.unet.config.sample_size
    channels, (_, tokens, width) = network.channels, network.pos_embed.shape
    latent = torch.randn(EXAMPLE_BATCH, channels, size, size)
    example = step_example(latent, torch.randn(EXAMPLE_BATCH, tokens, width), concepts=1)
    if pipeline is None:
        example["prompt_embeds"] = example["prompt"]
        # The network pools over the picture, so that its engines take a latent of any size.
        any_size = {"latent": {2: "height", 3: "width"}}
        bare = PublishedNetworkGraph(network)
        return {
            "safety": step_graph(PublishedSafetyGraph(controller), example, any_size),
            "published_network": graph(bare, example, engine_outputs("published_network"), any_size),
        }
    return model_graphs(pipeline) | {
        name: step_graph(PublishedStepGraph(controller, pipeline.unet, guided=guided), example)
        for name, guided in (("step", True), ("step_unguided", False))
    }
