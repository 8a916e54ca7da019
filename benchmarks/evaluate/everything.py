"""All tables in one command, and the report of them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from benchmarks.evaluate import method, robustness, training
from benchmarks.evaluate.options import WORK, FeatureChoice, Out, Quick, Tasks, Work
from benchmarks.report import RESULTS
from saferedir_torch.world.prompts import CONCEPTS

app = typer.Typer()


@app.command()
def everything(
    tasks: Tasks = None,
    runs: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            file_okay=False,
            help="Folder of a training, for what learns from its recorded runs; left out without it.",
        ),
    ] = None,
    quick: Quick = False,
    out: Out = RESULTS,
    work: Work = WORK,
    features: FeatureChoice = "auto",
) -> None:
    """Every table that needs no other model, and the report: many hours on two cores, --quick ten minutes on one.

    Models for `transfer` and the module for `relation` are trained first; those tables have commands of their own.

    Example: `python -m benchmarks.evaluate everything --quick --out runs/quick --work runs/quick`
    """
    for task in tasks or CONCEPTS:
        method.forgetting(task=task, quick=quick, out=out, work=work, features=features)
        method.forgetting(task=task, alone=True, quick=quick, out=out, work=work, features=features)
        robustness.attacks(task=task, quick=quick, out=out, work=work)
        robustness.gradient_attacks(task=task, quick=quick, out=out, work=work)
        if runs is not None:
            robustness.peers(runs=runs, task=task, quick=quick, out=out, work=work, features=features)
    for table in (method.benign, method.interference, method.choose_strength, method.cooldown, method.added):
        table(quick=quick, out=out, work=work, features=features)
    method.unfamiliar(quick=quick, out=out, work=work)
    method.words(out=out)
    if runs is not None:
        training.detection(runs, quick=quick, out=out, work=work)
        training.ablation(runs, quick=quick, out=out, work=work, features=features)
        training.splits(runs, quick=quick, out=out, work=work)
        training.generalisation(runs, quick=quick, out=out, work=work)
    method.report(out=out)
