"""Step graphs of a UNet's shape and a safety module that fits it, without weights: megabytes, kept in a folder.

`python -m benchmarks.gpu.graphs` makes those that are not there yet, on any machine: tracing takes a minute or two of one core.
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import onnx
import torch
from diffusers.configuration_utils import FrozenDict
from msgspec.structs import replace
from torch import Tensor, nn

from benchmarks.gpu import packed
from benchmarks.gpu import shapes as gpu_shapes
from benchmarks.gpu.packed import Packed
from benchmarks.gpu.shapes import Shape, build_unet, shapes
from saferedir.engines.whole_file import write_bytes
from saferedir.export import attention, half
from saferedir.export.engine_graph import StepModule, graph, step_example, step_graph
from saferedir.export.graphs import StepGraph
from saferedir.export.half import halved_model
from saferedir.export.model_graphs import PlainStepGraph, UNetGraph, unet_graph
from saferedir.export.onnx_export import to_onnx, traced_program
from saferedir.export.safety_graphs import SafetyGraph
from saferedir_torch.models import SHIPPED_SAFETY
from saferedir_torch.safety_module import SafetyModule

FOLDER = Path("runs/gpu_graphs")
STEPS = ("step", "plain_step")
#: What a step draws with: the UNet, or next to nothing, so that the safety is seen by itself.
UNET, NOTHING = "unet", "nothing"


class Nothing(nn.Module):
    """A denoiser that costs next to nothing, with a UNet's signature."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((1, channels, 1, 1), 0.5), requires_grad=False)
        self.config = FrozenDict({"time_cond_proj_dim": None})
        self.dtype = torch.float32

    def forward(self, latent: Tensor, timestep: Tensor, prompt_embeds: Tensor, return_dict: bool = False) -> tuple[Tensor, ...]:
        told = timestep[:, None, None, None] + prompt_embeds[:, :1, :1, None]
        drawn: Tensor = latent * self.scale + told
        return (drawn,)


@dataclass(frozen=True)
class Parts:
    """What the graphs of a shape are traced from, with its weights in two buffers."""

    shape: Shape
    safety: Packed
    unet: Packed

    @property
    def module(self) -> SafetyModule:
        assert isinstance(self.safety.network, SafetyGraph)
        return self.safety.network.controller.module

    def weights(self) -> dict[str, Any]:
        """The buffers by file name, as graphs name them."""
        return {packed.file: packed.buffer for packed in (self.safety, self.unet)}

    def example(self, batch: int) -> dict[str, Tensor]:
        """What a step of so many requests is given."""
        shape, config = self.shape, self.module.config
        latent = torch.randn(batch, config.latent_channels, shape.side, shape.side)
        return step_example(latent, torch.randn(batch, shape.tokens, shape.width), len(config.concepts))


def parts_of(shape: Shape) -> Parts:
    """A UNet of that shape in fp16, as a bundle computes, and a new safety module like the shipped one that fits it."""
    shipped = SafetyModule.load(SHIPPED_SAFETY).config
    torch.manual_seed(0)
    streams = (replace(shipped.streams[0], tokens=shape.tokens, width=shape.width),)
    module = SafetyModule(replace(shipped, streams=streams)).eval()
    unet = unet_graph(halved_model(build_unet(shape), torch.float16))
    return Parts(shape, Packed("safety.weights", SafetyGraph(module)), Packed("unet.weights", unet))


def step_graphs(parts: Parts, folder: Path = FOLDER) -> dict[str, dict[str, bytes]]:
    """What is drawn with -> step -> graph. What `folder` lacks is traced, and put there."""
    cache = Cache(folder)
    example = parts.example(2)
    example |= {"prompt_embeds": example["prompt"]}
    safety, unet = parts.safety.network, parts.unet.network
    assert isinstance(safety, SafetyGraph)
    ours = (parts.module.config, tuple(example["latent"].shape), METHOD)
    theirs = (parts.shape, UNET_TRACE)

    def steps(denoiser: str, network: Any, known: dict[str, Any]) -> dict[str, bytes]:
        plain = PlainStepGraph(network, guided=True, part=denoiser)
        modules: Mapping[str, StepModule] = {"step": StepGraph(safety, plain), "plain_step": plain}
        graphs = {denoiser: graph(plain.unet, example, ("model_output",))}
        graphs |= {name: step_graph(module, example) for name, module in modules.items()}
        models = {
            step: cache.get(f"{denoiser}_{step}", ours, theirs, make=partial(to_onnx, step, graphs, known)) for step in STEPS
        }
        return {step: model.SerializeToString(deterministic=True) for step, model in models.items()}

    traced_safety = cache.get("safety", ours, make=lambda: parts.safety.trace("safety", step_graph(safety, example)))
    traced_unet = cache.get(UNET, theirs, make=lambda: parts.unet.trace(UNET, graph(unet, example, ("model_output",))))
    return {
        UNET: steps(UNET, unet.unet, {"safety": traced_safety, UNET: traced_unet}),
        NOTHING: steps(NOTHING, Nothing(example["latent"].shape[1]), {"safety": traced_safety}),
    }


class Cache:
    """ONNX graphs in a folder, known by what they depend on, versions of what traces them left out: those that were made on one
    machine are measured on others."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def get(self, name: str, *depends_on: object, make: Callable[[], Any]) -> Any:
        """The graph that `make` makes, or made earlier."""
        path = self.folder / f"{name}-{hashlib.sha256(repr(depends_on).encode()).hexdigest()[:16]}.onnx"
        if not path.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            write_bytes(path, make().SerializeToString(deterministic=True))
        return onnx.load(str(path), load_external_data=False)


#: The code that the UNet's trace depends on, which takes minutes, and the code that all else does.
_OF_THE_UNET: tuple[Any, ...] = (attention, half, gpu_shapes, packed, UNetGraph, traced_program)
UNET_TRACE = "".join(inspect.getsource(code) for code in _OF_THE_UNET)
METHOD = "".join(
    file.read_text(encoding="utf-8")
    for one_of_each_package in (write_bytes, attention, SafetyModule)
    for file in sorted(Path(inspect.getfile(one_of_each_package)).parent.glob("*.py"))
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument("--dry-run", action="store_true", help="of tiny shapes")
    parser.add_argument("--only", choices=[shape.name for shape in shapes(tiny=True)])
    options = parser.parse_args()
    for shape in shapes(tiny=options.dry_run):
        if options.only in (None, shape.name):
            step_graphs(parts_of(shape), options.folder)


if __name__ == "__main__":
    main()
