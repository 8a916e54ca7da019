"""Model families: each exported, verified against eager PyTorch on real runs in which every other step fires, and measured.

`python -m benchmarks.families` takes small models of the true classes with random weights, and the embedded one. With `--full`
it takes one of Stable Diffusion 1.5's own size instead, one picture in two steps.
"""

from __future__ import annotations

import argparse
import math
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.lean import draw_lean, pixels_sha256
from benchmarks.report import save
from benchmarks.sd15_shape import build
from benchmarks.single_file import save_single_file
from benchmarks.small_pipeline import save_consistency, save_first, save_pixart, save_second, save_small_safety, save_turbo
from saferedir.engines import open_bundle
from saferedir.export.bundle_export import BundleOptions
from saferedir.export.command import export_folder
from saferedir.runtime import Pipeline, SafetyPolicy
from saferedir.runtime.replay import Runs
from saferedir.runtime.verify import verify_bundle
from saferedir_torch.models import SHIPPED_MODEL, SHIPPED_SAFETY, load_pipeline
from saferedir_torch.new_module import new_module
from saferedir_torch.world.source import WorldPrompts
from saferedir_torch.world.split import load_split

STEPS = 6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="a model of Stable Diffusion 1.5's size instead")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        if options.full:
            rows.append(measure("full size, random weights", full_size, Path(folder) / "full", Runs(pictures=1, steps=2), 2))
        for title, make in [] if options.full else track(list(models().items()), description="families"):
            rows.append(measure(title, make, Path(folder) / title.replace(" ", "-")))
    table = Table(
        "model", "family", "export, s", "MB", "worst error", "decisions equal", "PSNR, dB", "steps that fire", "without torch"
    )
    for row in rows:
        table.add_row(
            row["model"], row["family"], f"{row['seconds']:.0f}", f"{row['megabytes']:.1f}", f"{row['worst']:.1e}",
            f"{row['decisions_equal']} of {row['decisions']}", "equal" if row["psnr"] is None else f"{row['psnr']:.0f}",
            f"{row['fired']} of {row['steps']}", "equal" if row["drawn_without_torch"] else "differs",
        )  # fmt: skip
    console = Console()
    console.print(table)
    console.print(str(save("families_full" if options.full else "families", {"rows": rows})))


def models() -> dict[str, Callable[[Path], tuple[Path, Path]]]:
    """What is exported: title -> a function that gives model and safety, and may write them to a folder."""

    def small(save_model: Callable[[Path], Path]) -> Callable[[Path], tuple[Path, Path]]:
        def make(folder: Path) -> tuple[Path, Path]:
            model = save_model(folder / "model")
            save_small_safety(model, folder / "safety")
            return model, folder / "safety"

        return make

    def one_file(folder: Path) -> tuple[Path, Path]:
        model, safety = small(save_first)(folder)
        return save_single_file(load_pipeline(model), folder / "model.safetensors"), safety

    return {
        "embedded": lambda folder: (SHIPPED_MODEL, SHIPPED_SAFETY),
        "small, width 32": small(save_first),
        "the same in one file": one_file,
        "small, width 1024, v-prediction": small(save_second),
        "small, told the guidance scale": small(save_consistency),
        "small, one to four steps": small(save_turbo),
        "small transformer": small(save_pixart),
    }


def measure(
    title: str, make: Callable[[Path], tuple[Path, Path]], folder: Path, runs: Runs | None = None, steps: int = STEPS
) -> dict[str, Any]:
    """Export, verify, and draw with every score reaching its threshold."""
    folder.mkdir()
    model, safety = make(folder)
    row = export(title, model, safety, folder, steps)
    report = verify_bundle(folder / "bundle", folder / "saved" if model.is_file() else model, safety, runs=runs)
    assert report.parity is not None
    assert report.pictures is not None
    worst = max(report.parity, key=lambda line: line.worst)
    return row | {
        "verified": report.passed,
        "worst": worst.worst,
        "worst_where": f"{worst.engine}: {worst.output}",
        "decisions": report.pictures.decisions,
        "decisions_equal": report.pictures.decisions_equal,
        # None where pictures are equal.
        "psnr": None if math.isinf(report.pictures.psnr) else report.pictures.psnr,
        # Of the process until now, so that it is the largest model's where that comes last.
        "peak_memory_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
    }


def full_size(folder: Path) -> tuple[Path, Path]:
    """Stable Diffusion 1.5's shapes with random weights."""
    build().save_pretrained(folder / "model")
    new_module(load_pipeline(folder / "model"), WorldPrompts(["church"], load_split()), 0).save(folder / "safety")
    return folder / "model", folder / "safety"


def export(title: str, model: Path, safety: Path, folder: Path, steps: int) -> dict[str, Any]:
    """The bundle in `folder`, its size, what it took, and how many of its steps fire where all may."""
    started = time.monotonic()
    config = str(folder / "model") if model.is_file() else None
    export_folder(
        model, safety, folder / "bundle", BundleOptions(name="measured", max_batch=4), config=config,
        save_model=folder / "saved" if model.is_file() else None, on_step=lambda *_: None,
    )  # fmt: skip
    seconds = time.monotonic() - started
    bundle = open_bundle(folder / "bundle")
    names = [concept.name for concept in bundle.manifest.safety.concepts]
    firing = SafetyPolicy(thresholds=dict.fromkeys(names, 0.0), cooldown=1)
    drawn = Pipeline.from_bundle(folder / "bundle", policy=firing)("a church", seed=0, num_inference_steps=steps)
    record = drawn.records[0]
    return {
        "model": title,
        "family": bundle.manifest.model_family,
        "seconds": seconds,
        "megabytes": sum(path.stat().st_size for path in (folder / "bundle").iterdir()) / 1e6,
        "engines": len(bundle.manifest.engines),
        "steps": len(record.steps),
        "fired": sum(bool(step.fired) for step in record.steps),
        "drawn_without_torch": draw_lean(folder / "bundle", "a church", steps, firing) == pixels_sha256(drawn.images[0]),
    }


if __name__ == "__main__":
    main()
