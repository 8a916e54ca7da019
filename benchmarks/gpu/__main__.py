"""Milliseconds of a denoising step with and without safety on a GPU: `python -m benchmarks.gpu`, or `make bench-gpu`.

The embedded model and UNets of Stable Diffusion 1.5's and SDXL's shapes, each at three batches; the product's steps captured in
CUDA graphs, beside the same UNet in eager diffusers and compiled by PyTorch. One JSON, written anew after every contestant.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.gpu.benchmark import Benchmark, Plan
from benchmarks.gpu.graphs import FOLDER
from benchmarks.gpu.report import table
from benchmarks.gpu.subjects import EMBEDDED, names
from benchmarks.gpu.timing import Effort
from benchmarks.report import RESULTS, save

#: Of a dry run, which measures nothing.
DRY_OUT = Path("runs")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="the whole way on the CPU, with tiny shapes")
    parser.add_argument("--out", type=Path, help="folder of gpu.json; by default that of all results, of a dry run `runs`")
    parser.add_argument("--graphs", type=Path, default=FOLDER, help="folder of step graphs, made where they are not there yet")
    parser.add_argument("--models", nargs="+", choices=names(), default=list(names()))
    parser.add_argument("--minutes", type=float, default=5.0, help="what does not fit in is left out, and named")
    options = parser.parse_args()
    if not options.dry_run:
        if not torch.cuda.is_available():
            parser.error("there is no GPU here that PyTorch can use; --dry-run goes the same way on the CPU")
        _make_graphs([name for name in options.models if name != EMBEDDED], options.graphs)
    plan = (
        Plan("cpu", "ort-cpu", (1, 2), Effort(steps=2, seconds=5, warm_up=1))
        if options.dry_run
        else Plan("cuda", "ort-cuda", (1, 4, 16), Effort(steps=50, seconds=10))
    )
    benchmark = Benchmark(plan, options.graphs, options.minutes * 60, tiny=options.dry_run)
    out = options.out or (DRY_OUT if options.dry_run else RESULTS)
    for _ in benchmark.run(options.models):
        path = save("gpu", benchmark.figures(), out)
    console = Console()
    console.print(table(benchmark.figures()))
    console.print(str(path))


def _make_graphs(models: list[str], folder: Path) -> None:
    """Those that are not there yet, a process each: it takes minutes, which no benchmark should be measured beside."""
    command = [sys.executable, "-m", "benchmarks.gpu.graphs", "--folder", str(folder), "--only"]
    running = {model: subprocess.Popen([*command, model]) for model in models}
    failed = [model for model, process in running.items() if process.wait()]
    if failed:
        raise SystemExit(f"no step graphs of {', '.join(failed)}; `python -m benchmarks.gpu.graphs` says why")


if __name__ == "__main__":
    main()
