"""The course of the benchmark: model by model, contestant by contestant, batch by batch."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from benchmarks.gpu.contestants import Compiled, Eager, Pair, Runtime
from benchmarks.gpu.report import Row, device_facts, with_ratios
from benchmarks.gpu.subjects import Subject, subject
from benchmarks.gpu.timing import Effort, measure
from benchmarks.kernels import count_nodes
from saferedir.engines.printable import printable

Float32 = npt.NDArray[np.float32]

RUNTIME, ALONE, EAGER, COMPILED = "runtime", "safety alone", "eager", "compiled"
CONTESTANTS = {
    RUNTIME: "ONNX Runtime, steps captured in CUDA graphs",
    ALONE: "the same before a denoiser that costs next to nothing, where the safety is seen by itself",
    EAGER: "eager PyTorch, diffusers' UNet",
    COMPILED: "the same compiled by torch.compile, mode reduce-overhead",
}
#: Seconds that have to be left for a model to be compiled and measured, guessed from its size.
COMPILING = {"embedded": 40.0, "sd15": 60.0, "sdxl": 120.0}


@dataclass(frozen=True)
class Plan:
    """Where and how much is measured."""

    device: str
    #: Of the runtime.
    backend: str
    batches: tuple[int, ...]
    effort: Effort


class Benchmark:
    """What was measured so far."""

    def __init__(self, plan: Plan, graphs: Path, seconds: float, *, tiny: bool) -> None:
        self._plan, self._graphs, self._tiny = plan, graphs, tiny
        self._device = torch.device(plan.device)
        self._started, self._seconds = time.monotonic(), seconds
        self._models: dict[str, dict[str, Any]] = {}
        self._rows: list[Row] = []
        self._drawn: dict[tuple[str, int], Float32] = {}

    def run(self, models: Sequence[str]) -> Iterator[None]:
        """Stops after each contestant. What compiles comes last, since it takes longest and matters least."""
        for contestants in ((RUNTIME, ALONE, EAGER), (COMPILED,)):
            for name in models:
                if contestants == (COMPILED,) and self._left() < COMPILING[name]:
                    self._rows += [Row(name, COMPILED, batch, {"left_out": "no time left"}) for batch in self._plan.batches]
                    yield
                    continue
                chosen = subject(name, self._device, self._graphs, tiny=self._tiny)
                if name not in self._models:
                    self._models[name] = self._facts(chosen)
                for contestant in contestants:
                    if contestant != ALONE or chosen.alone is not None:
                        self._rows += self._measured(chosen, contestant)
                        self._free()
                        yield

    def _measured(self, chosen: Subject, contestant: str) -> list[Row]:
        """One row a batch; what fails is a row that says so, and takes no others along."""
        rows: list[Row] = []
        steps: Callable[[dict[str, Tensor]], Pair] | None = None
        for batch in self._plan.batches:
            try:
                steps = steps or self._contestant(chosen, contestant).steps
                torch.manual_seed(batch)
                pair = steps(chosen.example(batch))
                figures = measure(pair, self._device, self._plan.effort).figures()
                if contestant == ALONE:
                    del figures["safety_percent"]  # of nothing
                else:
                    figures["differs_by"] = self._difference(chosen.name, batch, pair.drawn())
            except Exception as error:  # out of memory, or whatever a compiler raises
                figures = _said(error)
            rows.append(Row(chosen.name, contestant, batch, figures))
        return rows

    def _contestant(self, chosen: Subject, contestant: str) -> Runtime | Eager:
        if contestant in (RUNTIME, ALONE):
            bundle = chosen.bundle if contestant == RUNTIME else chosen.alone
            assert bundle is not None
            return Runtime(bundle, self._plan.backend)
        return (Eager if contestant == EAGER else Compiled)(*chosen.eager(), self._device)

    def _difference(self, model: str, batch: int, drawn: Float32) -> float | None:
        """How far a plain step's latent lies from the first contestant's, of its largest magnitude, since all compute the
        same; None where they are not finite."""
        first = self._drawn.setdefault((model, batch), drawn)
        difference = float(np.abs(drawn - first).max() / np.abs(first).max())
        return difference if math.isfinite(difference) else None

    def _facts(self, chosen: Subject) -> dict[str, Any]:
        """What stands beside a model's rows."""
        counted = chosen.alone or chosen.bundle
        try:
            kernels = count_nodes(counted.engine("step"), counted.engine("plain_step"), self._plan.backend).figures()
        except Exception as error:  # ONNX Runtime raises several types of its own
            kernels = _said(error)
        return {
            "title": chosen.title,
            "precision": chosen.precision,
            "sizes": chosen.sizes,
            "safety_parameters": chosen.safety_parameters,
            "kernels_before": "its own denoiser" if chosen.alone is None else "a denoiser that costs next to nothing",
            "kernels": kernels,
        }

    def _left(self) -> float:
        """Seconds."""
        return self._seconds - (time.monotonic() - self._started)

    def _free(self) -> None:
        torch.compiler.reset()
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def figures(self) -> dict[str, Any]:
        """All that is known so far, as it is saved."""
        return {
            "dry_run": self._tiny,
            "times_mean": "nothing: a dry run of tiny shapes on a CPU" if self._tiny else "milliseconds of a denoising step",
            "device": device_facts(self._device),
            "contestants": CONTESTANTS,
            "models": self._models,
            "rows": with_ratios(self._rows, RUNTIME, (EAGER, COMPILED)),
            "seconds": time.monotonic() - self._started,
        }


def _said(error: Exception) -> dict[str, str]:
    """What stands in the place of figures."""
    return {"error": printable(str(error).strip().partition("\n")[0] or type(error).__name__)}
