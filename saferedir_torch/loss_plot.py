"""The loss log of a training as a picture."""

from __future__ import annotations

import csv
from pathlib import Path


def plot_losses(log: Path, out: Path) -> None:
    """Draw every column of `log` (a CSV with a column `step`) over the steps, on a logarithmic scale, to `out`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with log.open(newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows:
        return
    steps = [int(row["step"]) for row in rows]
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for column in [name for name in rows[0] if name != "step"]:
        axes.plot(steps, [float(row[column]) for row in rows], label=column, linewidth=2 if column == "loss" else 1)
    axes.set(xlabel="step", ylabel="loss", yscale="log")
    axes.grid(alpha=0.3)
    axes.legend(ncols=3)
    partial = out.with_suffix(".partial.png")
    figure.savefig(partial, dpi=120)
    pyplot.close(figure)
    partial.replace(out)
