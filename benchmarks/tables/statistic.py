"""Which statistic of a run detects most at the same promise: the highest step, or a sequential sum (Page 1954)?

Offline, on recorded runs that training left out: thresholds by the benign ones of a calibration, power by the unsafe ones.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from saferedir_torch.calibration import Seen, allowed_exceedances
from saferedir_torch.evaluation.intervals import share
from saferedir_torch.runs import RunBank
from saferedir_torch.safety_module import SafetyModule

#: How far below its centre a step's log-odds count against the sum.
DRIFTS = (-4.0, -2.0, 0.0, 2.0)
#: By which share of the steps a run is to be detected.
EARLY = 0.4


def statistics(seen: Seen, module: SafetyModule) -> dict[str, Tensor]:
    """Every statistic after each step, [R, steps, N]; steps that a run has not are as the last."""
    of_steps = seen.statistic(module)
    told = Seen.__new__(Seen)
    told.told, told.shown, told.bank = seen.told, torch.full_like(seen.shown, -torch.inf), seen.bank
    shown = Seen.__new__(Seen)
    shown.told, shown.shown, shown.bank = torch.full_like(seen.told, -torch.inf), seen.shown, seen.bank
    padded = _padded(of_steps, seen.bank, -torch.inf)
    weights = _padded(_weights(seen.bank)[:, None], seen.bank, 0.0)
    found = {
        "highest": padded.cummax(dim=1).values,
        "highest, told alone": _padded(told.statistic(module), seen.bank, -torch.inf).cummax(dim=1).values,
        "highest, shown alone": _padded(shown.statistic(module), seen.bank, -torch.inf).cummax(dim=1).values,
    }
    for drift in DRIFTS:
        total, sums = torch.zeros_like(padded[:, 0]), []
        for step in range(padded.shape[1]):
            added = torch.where(padded[:, step].isfinite(), padded[:, step] - drift, 0.0)
            total = (total + weights[:, step] * added).clamp(min=0)
            sums.append(total)
        found[f"sum, drift {drift:g}"] = torch.stack(sums, dim=1).cummax(dim=1).values
    return found


def compare(module: SafetyModule, benign: RunBank, unsafe: RunBank, rate: float) -> dict[str, Any]:
    """Of each statistic, at the threshold that the promise of `rate` sets on `benign`: shares of the `unsafe` runs that are
    detected at all, and by 40 % of their steps."""
    allowed = allowed_exceedances(int(benign.run.max()) + 1, rate)
    clean, found = statistics(Seen(module, benign), module), statistics(Seen(module, unsafe), module)
    asked, steps = _asked(unsafe), _steps(unsafe)
    rows = {}
    for name, values in found.items():
        highest = np.sort(clean[name][:, -1].amax(dim=1).numpy())[::-1]
        passed = (values > float(highest[allowed])) & (asked[:, None] > 0)
        first = torch.where(passed.any(dim=2).any(dim=1), passed.any(dim=2).float().argmax(dim=1), 10**6)
        rows[name] = {
            "threshold": float(highest[allowed]),
            "detected": share(int((first < 10**6).sum()), len(first)),
            "early": share(int((first < (EARLY * steps).round()).sum()), len(first)),
        }
    return rows


def _asked(bank: RunBank) -> Tensor:
    runs = int(bank.run.max()) + 1
    return torch.zeros(runs, bank.asked.shape[1]).scatter_reduce(0, bank.run[:, None].expand_as(bank.asked), bank.asked, "amax")


def _steps(bank: RunBank) -> Tensor:
    return torch.bincount(bank.run).float()


def _padded(values: Tensor, bank: RunBank, nothing: float) -> Tensor:
    """Values [S, N] of steps -> [R, steps, N]."""
    counts = torch.bincount(bank.run)
    starts = counts.cumsum(0) - counts
    place = torch.arange(len(bank.run)) - starts[bank.run]
    padded = torch.full((len(counts), int(counts.max()), values.shape[1]), nothing)
    padded[bank.run, place] = values
    return padded


def _weights(bank: RunBank) -> Tensor:
    """The change of the log signal-to-noise ratio in each step, [S], as shares of a run's."""
    share = bank.share.double().clamp(1e-3, 1 - 1e-3)
    level: npt.NDArray[np.float64] = 2 * np.log((1 - share.numpy()) / share.numpy())
    last = np.append(bank.run.numpy()[1:] != bank.run.numpy()[:-1], True)
    ahead = np.where(last, 2 * np.log(999), np.append(level[1:], 0))
    change = torch.from_numpy(ahead - level).float().clamp(min=0)
    total = torch.zeros(int(bank.run.max()) + 1).scatter_add(0, bank.run, change)
    return change / total[bank.run]
