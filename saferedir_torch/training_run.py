"""One resumable training loop, shared by every network that the project trains."""

from __future__ import annotations

import csv
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn

from saferedir.engines.errors import TrainingError

LOG_EVERY = 25


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How long and how fast. The learning rate warms up, then falls linearly to `final_share` of its peak."""

    total_steps: int
    warmup_steps: int = 200
    final_share: float = 0.02

    def factor(self, step: int) -> float:
        """Share of the peak learning rate at `step`."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        left = (self.total_steps - step) / max(1, self.total_steps - self.warmup_steps)
        return self.final_share + (1 - self.final_share) * max(0.0, left)


class ExponentialAverage:
    """Moving average of a module's parameters, ramped up so that early steps are forgotten soon."""

    def __init__(self, module: nn.Module, decay: float = 0.9995) -> None:
        self.decay = decay
        self.shadow = {name: p.detach().clone() for name, p in module.named_parameters()}

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        targets, sources = [], []
        for name, parameter in module.named_parameters():
            targets.append(self.shadow[name])
            sources.append(parameter.detach())
        torch._foreach_lerp_(targets, sources, 1 - decay)

    def state_dict(self) -> dict[str, Tensor]:
        return self.shadow

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.shadow = {name: tensor.clone() for name, tensor in state.items()}


def run_training(
    *,
    folder: Path,
    name: str,
    modules: Mapping[str, nn.Module],
    optimizer: torch.optim.Optimizer,
    schedule: Schedule,
    loss_of_step: Callable[[int], tuple[Tensor, dict[str, float]]],
    averages: Mapping[str, ExponentialAverage] | None = None,
    sample: Callable[[int], None] | None = None,
    sample_every: int = 0,
    checkpoint_every_s: float = 120,
    clip_norm: float = 1.0,
) -> None:
    """Optimise until `schedule.total_steps`, from `folder/name.ckpt` where there is one.

    `loss_of_step(step)` must draw its data from `step` alone (seeded), so that a run that was interrupted and resumed
    sees the same batches as one that was not. Losses are appended to `folder/name.csv`.

    Raises:
        TrainingError: a loss is NaN or infinite; the last checkpoint stays as it was.
    """
    folder.mkdir(parents=True, exist_ok=True)
    averages = averages or {}
    checkpoint = folder / f"{name}.ckpt"
    start = _resume(checkpoint, modules, optimizer, averages)
    peak_rates = [group["initial_lr"] if "initial_lr" in group else group["lr"] for group in optimizer.param_groups]
    for group, rate in zip(optimizer.param_groups, peak_rates, strict=True):
        group["initial_lr"] = rate
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for module in modules.values():
        module.train()

    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    _truncate_log(folder / f"{name}.csv", start)
    sums: dict[str, float] = {}
    counted = 0
    last_save = time.monotonic()
    with Progress(*columns) as progress:
        bar = progress.add_task(name, total=schedule.total_steps, completed=start)
        for step in range(start, schedule.total_steps):
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * schedule.factor(step)
            loss, parts = loss_of_step(step)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            norm = nn.utils.clip_grad_norm_(parameters, clip_norm)
            if not bool(torch.isfinite(norm)):
                raise TrainingError(f"{name}: the loss or its gradient is not finite at step {step}; {checkpoint} is untouched")
            optimizer.step()
            for key, average in averages.items():
                average.update(modules[key], step)
            for key, value in {"loss": float(loss.detach()), **parts}.items():
                sums[key] = sums.get(key, 0.0) + value
            counted += 1
            done = step + 1
            finished = done == schedule.total_steps
            if done % LOG_EVERY == 0 or finished:
                means = {key: value / counted for key, value in sums.items()}
                sums.clear()
                counted = 0
                _append_log(folder / f"{name}.csv", done, means)
                progress.update(bar, completed=done, description=f"{name} loss {means['loss']:.4f}")
            if finished or time.monotonic() - last_save > checkpoint_every_s:
                save_checkpoint(checkpoint, modules, optimizer, averages, done)
                last_save = time.monotonic()
            if sample is not None and sample_every and (done % sample_every == 0 or finished):
                for module in modules.values():
                    module.eval()
                sample(done)
                for module in modules.values():
                    module.train()


def save_checkpoint(
    path: Path,
    modules: Mapping[str, nn.Module],
    optimizer: torch.optim.Optimizer,
    averages: Mapping[str, ExponentialAverage],
    step: int,
) -> None:
    """Write beside, then rename: a checkpoint is whole or absent."""
    state = {
        "step": step,
        "modules": {key: module.state_dict() for key, module in modules.items()},
        "optimizer": optimizer.state_dict(),
        "averages": {key: average.state_dict() for key, average in averages.items()},
    }
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    os.replace(partial, path)


def _resume(
    path: Path,
    modules: Mapping[str, nn.Module],
    optimizer: torch.optim.Optimizer,
    averages: Mapping[str, ExponentialAverage],
) -> int:
    if not path.exists():
        return 0
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        for key, module in modules.items():
            module.load_state_dict(state["modules"][key])
        optimizer.load_state_dict(state["optimizer"])
        for key, average in averages.items():
            average.load_state_dict(state["averages"][key])
        return int(state["step"])
    except (RuntimeError, KeyError, EOFError, ValueError, OSError) as error:
        raise TrainingError(f"{path} does not fit this run ({error}); delete it to start anew, or restore it") from error


def _append_log(path: Path, step: int, means: Mapping[str, float]) -> None:
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow(["step", *means])
        writer.writerow([step, *(f"{value:.6f}" for value in means.values())])


def _truncate_log(path: Path, step: int) -> None:
    """Drop rows later than the checkpoint that training resumes from."""
    if not path.exists():
        return
    header, *rows = path.read_text().splitlines(keepends=True) or [""]
    if not header.startswith("step,"):
        raise TrainingError(f"{path} is no log of a training, and is left as it is; name another folder")
    path.write_text("".join([header, *(row for row in rows if int(row.partition(",")[0]) <= step)]))
