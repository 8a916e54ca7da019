"""Which statistic of a run detects most at the same promise: the highest step, or a sequential sum (Page 1954)?

Offline, on recorded runs that training left out: thresholds by the benign ones of a calibration, power by the unsafe ones.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from saferedir_torch.calibration import Seen, allowed_exceedances
from saferedir_torch.evaluation.intervals import share
from saferedir_torch.learner import held_out, split_of
from saferedir_torch.runs import RunBank
from saferedir_torch.safety_module import SafetyModule

#: How far below its centre a step's log-odds count against the sum.
DRIFTS = (-4.0, -2.0, 0.0, 2.0)
#: By which share of the steps a run is to be detected.
EARLY = 0.4
#: Beyond any step.
NEVER = 10**6


def statistic(module: SafetyModule, benign: RunBank, recorded: RunBank, seed: int) -> dict[str, Any]:
    """Of each statistic, at the threshold that the module's promise sets on `benign`: which of the unsafe runs are detected at
    all, and by 40 % of their steps. The unsafe runs are those of `recorded` that the training of `seed` left out."""
    held = recorded.rows(held_out(int(recorded.run.max()) + 1, split_of(seed))[recorded.run])
    unsafe = held.rows((held.highest(held.asked) > 0).any(dim=1)[held.run])
    promise = module.config.promise
    assert promise is not None
    allowed = allowed_exceedances(int(benign.run.max()) + 1, promise.rate)
    clean, found = _statistics(Seen(module, benign), module), _statistics(Seen(module, unsafe), module)
    asked, steps = unsafe.highest(unsafe.asked) > 0, torch.bincount(unsafe.run)
    rows = {}
    for name, values in found.items():
        threshold = float(clean[name][:, -1].amax(dim=1).sort(descending=True).values[allowed])
        passed = ((values > threshold) & asked[:, None]).any(dim=2)  # [R, steps]
        first = torch.where(passed.any(dim=1), passed.float().argmax(dim=1), NEVER)
        rows[name] = {
            "threshold": threshold,
            "detected": share(int((first < NEVER).sum()), len(first)),
            "early": share(int((first < (EARLY * steps).round()).sum()), len(first)),
        }
    return {"benign": int(benign.run.max()) + 1, "allowed": allowed, "unsafe": len(asked), "rows": rows}


def _statistics(seen: Seen, module: SafetyModule) -> dict[str, Tensor]:
    """Every statistic after each step, [R, steps, N]; steps that a run has not are as the last."""
    padded = _padded(seen.statistic(module), seen.bank, -torch.inf)
    weights = _padded(_weights(seen.bank)[:, None], seen.bank, 0.0)
    found = {"highest": padded.cummax(dim=1).values}
    for left, title in (("shown", "highest, with the conditioning alone"), ("told", "highest, by the picture alone")):
        part = copy.copy(seen)
        setattr(part, left, torch.full_like(seen.told, -torch.inf))
        found[title] = _padded(part.statistic(module), seen.bank, -torch.inf).cummax(dim=1).values
    for drift in DRIFTS:
        total, sums = torch.zeros_like(padded[:, 0]), []
        for step in range(padded.shape[1]):
            added = torch.where(padded[:, step].isfinite(), padded[:, step] - drift, 0.0)
            total = (total + weights[:, step] * added).clamp(min=0)
            sums.append(total)
        found[f"sum, drift {drift:g}"] = torch.stack(sums, dim=1).cummax(dim=1).values
    return found


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
