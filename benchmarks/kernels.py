"""How many kernels the safety launches: nodes of the optimised step with and without it, by operator.

`python -m benchmarks.kernels [BUNDLE]`; with `--module FOLDER` of a safety module alone, which is traced in seconds. Graphs are
taken as ONNX Runtime leaves them after its extended optimisations, before it lays tensors out for one processor. Without a GPU
the CPU's provider stands in, whose fusions differ a little from CUDA's. A node counts once, though some launch several kernels.
"""

from __future__ import annotations

import argparse
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import torch
from rich.console import Console
from rich.table import Table

from saferedir.engines import open_bundle
from saferedir.engines.bundle import DEFAULT_BUNDLE, EngineBytes
from saferedir.export.engine_graph import step_example, step_graph
from saferedir.export.onnx_export import to_onnx
from saferedir.export.safety_graphs import SafetyGraph
from saferedir.runtime.installation import import_onnxruntime
from saferedir.runtime.ort import PROVIDERS, give_weights
from saferedir_torch.safety_module import SafetyModule

#: Height and width of the latent that a module alone is traced with; the nodes do not depend on it.
SIDE = 16
#: Operators that launch nothing: constants, shapes, which lie on the host, and new shapes for what is there already.
SILENT = frozenset(("Constant", "Flatten", "Identity", "Reshape", "Shape", "Size", "Squeeze", "Unsqueeze"))


@dataclass(frozen=True)
class NodeCounts:
    """Nodes of an optimised step by operator, with and without safety."""

    protected: Counter[str]
    plain: Counter[str]

    @property
    def safety(self) -> Counter[str]:
        """What the safety adds; negative where a protected step has fewer."""
        operators = self.protected.keys() | self.plain.keys()
        return Counter({name: n for name in operators if (n := self.protected[name] - self.plain[name])})

    def figures(self) -> dict[str, Any]:
        """All nodes and those that launch a kernel, of either step and of the safety; the safety's by operator."""
        parts = {"protected": self.protected, "plain": self.plain, "safety": self.safety}
        totals = {name: {"nodes": counts.total(), "launching": launching(counts)} for name, counts in parts.items()}
        return {**totals, "safety_by_operator": dict(self.safety.most_common())}


def launching(operators: Counter[str]) -> int:
    """How many of the nodes launch a kernel."""
    return sum(count for name, count in operators.items() if name not in SILENT)


def count_nodes(protected: EngineBytes, plain: EngineBytes, backend: str = "ort-cpu") -> NodeCounts:
    """Nodes of two engines, as ONNX Runtime optimises them for the provider of `backend`."""
    return NodeCounts(optimised_operators(protected, backend), optimised_operators(plain, backend))


def optimised_operators(engine: EngineBytes, backend: str = "ort-cpu") -> Counter[str]:
    """The engine's nodes by operator after ONNX Runtime's extended optimisations."""
    ort, provider = import_onnxruntime(), PROVIDERS[backend]
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.log_severity_level = 3
    if backend == "ort-cuda":
        ort.preload_dlls()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "optimised.onnx"
        options.optimized_model_filepath = str(path)
        # Weights would make the file larger than protobuf allows.
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "weights")
        give_weights(options, engine.weights)
        ort.InferenceSession(engine.graph, options, providers=[(provider.ort_name, dict(provider.options))])
        nodes = onnx.load(path, load_external_data=False).graph.node
    return Counter(node.op_type for node in nodes)


def safety_alone(module: SafetyModule) -> EngineBytes:
    """The safety's part of a step, without the step around it."""
    config = module.config
    latent = torch.randn(2, config.latent_channels, SIDE, SIDE)
    example = step_example(latent, torch.randn(2, config.streams[0].tokens, config.streams[0].width), len(config.concepts))
    model = to_onnx("safety", {"safety": step_graph(SafetyGraph(module.eval()), example)})
    return EngineBytes(model.SerializeToString(), {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", nargs="?", default=DEFAULT_BUNDLE)
    parser.add_argument("--module", type=Path, help="folder of a safety module, counted by itself")
    parser.add_argument("--backend", choices=("ort-cpu", "ort-cuda"), default="ort-cpu", help="whose provider optimises")
    options = parser.parse_args()
    if options.module is not None:
        alone = optimised_operators(safety_alone(SafetyModule.load(options.module)), options.backend)
        counts = NodeCounts(alone, Counter())
    else:
        bundle = open_bundle(options.bundle)
        counts = count_nodes(bundle.engine("step"), bundle.engine("plain_step"), options.backend)
    console = Console()
    console.print(totals_table(counts))
    console.print(operators_table(counts.safety))


def totals_table(counts: NodeCounts) -> Table:
    table = Table("step", "nodes", "launch a kernel")
    for name, operators in (("with safety", counts.protected), ("without", counts.plain), ("the safety", counts.safety)):
        table.add_row(name, str(operators.total()), str(launching(operators)))
    return table


def operators_table(operators: Counter[str]) -> Table:
    table = Table("of the safety", "nodes", "launches")
    for name, count in operators.most_common():
        table.add_row(name, str(count), "no" if name in SILENT else "yes")
    return table


if __name__ == "__main__":
    main()
