"""What graph optimisers buy: nodes, time to load and time of a call of the UNet as it is exported, and after each of them.

`python -m benchmarks.optimisers` takes the embedded model's UNet and one of the two upper levels of Stable Diffusion 1.5, with
random weights; ONNX Runtime's own optimisations are on in every row. Needs `onnxslim` besides.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import onnx
import onnxruntime
import torch
from diffusers import UNet2DConditionModel
from rich.console import Console
from rich.table import Table

from benchmarks.report import environment, save
from saferedir.export import onnx_export
from saferedir.export.engine_graph import EXAMPLE_BATCH, Graph
from saferedir.export.model_graphs import UNetGraph
from saferedir_torch.models import load_pipeline

CALLS = 9


def main() -> None:
    rows = [row for title, (unet, tokens, batches) in models().items() for row in measure(title, unet, tokens, batches)]
    table = Table("UNet", "batch", "graph", "nodes", "MB", "loads, s", "call, ms", "against as exported", "differs by")
    for row in rows:
        table.add_row(
            row["unet"], str(row["batch"]), row["graph"], str(row["nodes"]), f"{row['megabytes']:.1f}", f"{row['load']:.2f}",
            f"{1000 * row['call']:.1f}", f"{row['ratio']:.2f}x", f"{row['difference']:.1e}",
        )  # fmt: skip
    console = Console()
    console.print(environment()["machine"])
    console.print(table)
    console.print(str(save("optimisers", {"calls": CALLS, "rows": rows})))


def models() -> dict[str, tuple[Any, int, tuple[int, ...]]]:
    """UNets with the tokens of their prompts and batches, both halves of guidance counted."""
    torch.manual_seed(0)
    upper = UNet2DConditionModel(
        sample_size=64, block_out_channels=(320, 640), down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2, cross_attention_dim=768, attention_head_dim=8, layers_per_block=1,
    )  # fmt: skip
    return {"embedded": (load_pipeline().unet, 77, (2, 16)), "upper half of SD 1.5": (upper.eval(), 77, (2,))}


def measure(title: str, unet: Any, tokens: int, batches: tuple[int, ...]) -> list[dict[str, Any]]:
    """All graphs of one UNet, which take turns."""
    config = unet.config
    example = {
        "latent": torch.randn(EXAMPLE_BATCH, config.in_channels, config.sample_size, config.sample_size),
        "timestep": torch.full((EXAMPLE_BATCH,), 500.0),
        "prompt_embeds": torch.randn(EXAMPLE_BATCH, tokens, config.cross_attention_dim),
    }
    graph = Graph(UNetGraph(unet), example, ("model_output",))
    with patch.object(onnx_export, "attention_nodes", nullcontext):
        plain = onnx_export.to_onnx("unet", {"unet": graph})
    ways: dict[str, Callable[[], Any]] = {
        "as exported": lambda: plain,
        "onnxslim": lambda: _slim(plain),
        "ONNX Runtime's transformer optimiser": lambda: _transformers(plain),
        "attention as one node": lambda: onnx_export.to_onnx("unet", {"unet": graph}),
    }
    rows, sessions = [], {}
    for way, make in ways.items():
        model = make()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "unet.onnx"
            onnx.save(model, str(path))
            started = time.perf_counter()
            sessions[way] = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
            loaded = time.perf_counter() - started
            rows.append({"unet": title, "graph": way, "nodes": len(model.graph.node), "load": loaded,
                         "megabytes": path.stat().st_size / 1e6})  # fmt: skip
    return [row | timed for batch in batches for row, timed in zip(rows, _timed(sessions, example, batch), strict=True)]


def _timed(sessions: dict[str, Any], example: dict[str, torch.Tensor], batch: int) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    given = {name: rng.standard_normal((batch, *tensor.shape[1:])).astype(np.float32) for name, tensor in example.items()}
    given["timestep"] = np.full(batch, 500, np.float32)
    results = {way: session.run(None, given)[0] for way, session in sessions.items()}
    times: dict[str, list[float]] = {way: [] for way in sessions}
    for _ in range(CALLS):
        for way, session in sessions.items():
            started = time.perf_counter()
            session.run(None, given)
            times[way].append(time.perf_counter() - started)
    medians = {way: statistics.median(taken) for way, taken in times.items()}
    reference = next(iter(results))
    return [
        {
            "batch": batch, "call": medians[way], "all": times[way], "ratio": medians[reference] / medians[way],
            "difference": float(np.abs(results[way] - results[reference]).max()),
        }
        for way in sessions
    ]  # fmt: skip


def _slim(model: Any) -> Any:
    import onnxslim

    return onnxslim.slim(model)


def _transformers(model: Any) -> Any:
    from onnxruntime.transformers.fusion_options import FusionOptions
    from onnxruntime.transformers.optimizer import optimize_model

    options = FusionOptions("unet")
    # These have kernels on CUDA alone.
    options.enable_group_norm = options.enable_skip_group_norm = options.enable_bias_splitgelu = False
    options.enable_nhwc_conv = options.enable_bias_add = options.enable_packed_kv = options.enable_packed_qkv = False
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    optimised = optimize_model(copy, "unet", num_heads=0, hidden_size=0, optimization_options=options, opt_level=0)
    return optimised.model


if __name__ == "__main__":
    main()
