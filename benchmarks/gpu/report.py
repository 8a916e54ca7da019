"""What is printed and saved of the benchmark."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table


@dataclass(frozen=True)
class Row:
    """A contestant at one batch of one model: figures, an error, or why it was left out."""

    model: str
    contestant: str
    batch: int
    figures: dict[str, Any]


def with_ratios(rows: Sequence[Row], own: str, others: Sequence[str]) -> list[dict[str, Any]]:
    """The rows as they are saved; those of `others` say how many times faster our protected step is than theirs."""
    ours = {(row.model, row.batch): row.figures.get("protected_ms") for row in rows if row.contestant == own}
    saved = []
    for row in rows:
        entry = {"model": row.model, "contestant": row.contestant, "batch": row.batch, **row.figures}
        reference = ours.get((row.model, row.batch))
        if row.contestant in others and reference and "protected_ms" in entry:
            entry["ours_is_faster_by"] = entry["protected_ms"] / reference
        saved.append(entry)
    return saved


def device_facts(device: torch.device) -> dict[str, Any]:
    """The card and CUDA's version, beside what every benchmark says of its environment."""
    if device.type != "cuda":
        return {"name": "cpu"}
    card = torch.cuda.get_device_properties(device)
    return {
        "name": card.name,
        "compute_capability": f"{card.major}.{card.minor}",
        "memory_gb": card.total_memory / 1e9,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
    }


def table(figures: dict[str, Any]) -> Table:
    """All rows, in milliseconds; quartiles are in the JSON."""
    title = f"{figures['device']['name']}: {figures['times_mean']}"
    shown = Table("model", "batch", "contestant", "protected", "plain", "safety", "of plain", "steps", "ours is", title=title)
    for row in figures["rows"]:
        start = (row["model"], str(row["batch"]), row["contestant"])
        if "protected_ms" not in row:
            shown.add_row(*start, row.get("error") or row["left_out"])
            continue
        shown.add_row(
            *start, *(f"{row[f'{kind}_ms']:.3f}" for kind in ("protected", "plain", "safety")),
            f"{row['safety_percent']:.2f} %" if "safety_percent" in row else "", str(row["steps"]),
            f"{row['ours_is_faster_by']:.2f}x faster" if "ours_is_faster_by" in row else "",
        )  # fmt: skip
    return shown
