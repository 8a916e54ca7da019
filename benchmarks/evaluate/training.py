"""Modules that are trained to be compared."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from benchmarks.drawing import Studio
from benchmarks.evaluate.options import WORK, Out, Quick, Work, store
from benchmarks.report import RESULTS
from saferedir_torch.models import load_pipeline
from saferedir_torch.safety_module import SafetyModule
from saferedir_torch.world.split import load_split

app = typer.Typer()


@app.command()
def relation(
    safety: Annotated[Path, typer.Option(help="Folder of a module that was trained with `train --concept armed_animal`.")],
    quick: Quick = False,
    out: Out = RESULTS,
    work: Work = WORK,
) -> None:
    """A concept that no single word names, a weapon beside an animal: what is gone, and what of either alone is left."""
    from benchmarks.tables.relation import QUICK, Size
    from benchmarks.tables.relation import relation as measure

    size = QUICK if quick else Size()
    store("relation", measure(Studio(work), load_pipeline(), SafetyModule.load(safety), load_split(), size), out)
