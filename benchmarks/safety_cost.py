"""What safety costs at Stable Diffusion 1.5's shapes: operations and time per step, ours and the published network's.

All in one run: `python -m benchmarks.safety_cost`. With `--unet` the guided step of a UNet of 860 M parameters with random
weights is timed as well (4 GB, a minute).
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from msgspec.structs import replace
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.report import environment, save
from saferedir.export.engine_graph import Graph, step_example, step_graph
from saferedir.export.onnx_export import to_onnx
from saferedir.export.published_graphs import published_graphs
from saferedir.export.safety_graphs import SafetyGraph
from saferedir_torch.models import SHIPPED_SAFETY
from saferedir_torch.published import PublishedNetwork
from saferedir_torch.safety_module import SafetyModule

WIDTH, TOKENS, SIZE = 768, 77, 64
REPEATS = 30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument("--unet", action="store_true")
    options = parser.parse_args()
    figures = measure(options.repeats, options.unet)
    table = Table("engine", "GFLOP", "ms", "of the published network's time")
    for row in figures["rows"]:
        table.add_row(row["engine"], f"{row['gflop']:.2f}", f"{1000 * row['seconds']:.2f}", f"{row['of_published']:.3f}")
    console = Console()
    console.print(environment()["machine"])
    console.print(table)
    console.print(str(save("safety_cost", figures)))


def measure(repeats: int, unet: bool) -> dict[str, Any]:
    """One request a call, all engines in turn, the median of `repeats` calls each."""
    torch.manual_seed(0)
    shipped = SafetyModule.load(SHIPPED_SAFETY).config
    streams = (replace(shipped.streams[0], tokens=TOKENS, width=WIDTH),)
    module = SafetyModule(replace(shipped, streams=streams)).eval()
    example = step_example(torch.randn(2, 4, SIZE, SIZE), torch.randn(2, TOKENS, WIDTH), len(shipped.concepts))
    published = published_graphs(None, PublishedNetwork().eval(), mask_again=False)
    graphs = {"safety": step_graph(SafetyGraph(module), example), "published_network": published["published_network"]}
    calls: dict[str, Callable[[], object]] = {}
    gflop: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, graph in graphs.items():
            inputs = one_request(name, graph)
            calls[name] = _session(name, graphs, inputs, Path(folder))
            gflop[name] = _gflop(graph.module, inputs)
        if unet:
            calls["unet"], gflop["unet"] = _unet()
        seconds: dict[str, list[float]] = {name: [] for name in calls}
        for name, call in calls.items():
            call()  # warm
            if name == "unet":
                seconds[name].append(_timed(call))
        for _ in range(repeats):
            for name in graphs:
                seconds[name].append(_timed(calls[name]))
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "shapes": {"latent": SIZE, "tokens": TOKENS, "width": WIDTH, "concepts": len(shipped.concepts)},
        "repeats": repeats,
        "rows": [
            {
                "engine": name,
                "gflop": gflop[name],
                "seconds": medians[name],
                "of_published": medians[name] / medians["published_network"],
                **({"of_a_guided_step": medians[name] / medians["unet"]} if unet else {}),
            }
            for name in medians
        ],
    }


def one_request(name: str, graph: Graph) -> dict[str, Tensor]:
    """The example of a graph with a batch of one; a published network sees a latent of the same size as ours."""
    inputs = {key: value[:1].contiguous() for key, value in graph.inputs.items()}
    if name == "published_network":
        inputs["latent"] = torch.randn(1, 4, SIZE, SIZE)
    return inputs


def _session(name: str, graphs: dict[str, Graph], inputs: dict[str, Tensor], folder: Path) -> Callable[[], object]:
    path = folder / f"{name}.onnx"
    path.write_bytes(to_onnx(name, graphs).SerializeToString())
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    given = {key: value.numpy() for key, value in inputs.items()}
    return lambda: session.run(None, given)


@torch.no_grad()
def _gflop(module: torch.nn.Module, inputs: dict[str, Tensor]) -> float:
    with FlopCounterMode(display=False) as counter:
        module(*inputs.values())
    return float(counter.get_total_flops()) / 1e9


def _unet() -> tuple[Callable[[], object], float]:
    """A guided step of the UNet in eager PyTorch: two rows."""
    from benchmarks.sd15_shape import build

    unet = build().unet.float().eval()
    inputs = (torch.randn(2, 4, SIZE, SIZE), torch.full((2,), 500.0), torch.randn(2, TOKENS, WIDTH))

    @torch.no_grad()
    def call() -> object:
        return unet(*inputs, return_dict=False)

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        call()
    return call, counter.get_total_flops() / 1e9


def _timed(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
