"""Every engine of a protected model, the whole denoising step among them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from saferedir.engines.manifest import sized
from saferedir.engines.step import Form, step_inputs, step_outputs
from saferedir.export.engine_graph import Graph, StepModule, step_graph
from saferedir.export.model_graphs import PlainStepGraph, Size, model_graphs, own_size, pipeline_example
from saferedir.export.safety_graphs import SafetyGraph
from saferedir_torch.controller import finite
from saferedir_torch.safety_module import SafetyModule


class StepGraph(StepModule):
    """A whole denoising step: safety, UNet, guidance, scheduler update, every quantity per request."""

    def __init__(self, safety: SafetyGraph, denoiser: PlainStepGraph) -> None:
        super().__init__(Form.PROTECTED)
        self.safety = safety
        self.denoiser = denoiser

    def compute(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        seen = tensors["latent"] * tensors["input_scale"]
        said = self.safety(*((tensors | {"latent": seen})[name] for name in step_inputs(Form.SAFETY)))
        given = dict(zip(step_outputs(Form.SAFETY), said, strict=True))
        drawn = self.denoiser.drawn(tensors | {"prompt": given["next_prompt"]}, seen)
        given["next_ok"] = given["next_ok"] & finite(drawn["next_latent"])
        return given | drawn


def all_graphs(pipeline: Any, safety: SafetyModule, further_sizes: Sequence[Size] = ()) -> dict[str, Graph]:
    """Every engine of a Stable Diffusion pipeline protected by `safety`, and the parts that these call, with example inputs,
    for latents of the model's own size and of further ones."""
    own = own_size(pipeline)
    graphs: dict[str, Graph] = {}
    for size in (own, *further_sizes):
        example = pipeline_example(pipeline, size, len(safety.config.concepts))
        part, unet = sized("safety", size, own), sized("unet", size, own)
        graphs |= model_graphs(pipeline, size) | {part: step_graph(SafetyGraph(safety, part), example)}
        for name, guided in (("step", True), ("step_unguided", False)):
            called = SafetyGraph(safety, part), PlainStepGraph(pipeline.unet, guided=guided, part=unet)
            graphs[sized(name, size, own)] = step_graph(StepGraph(*called), example)
    return graphs
