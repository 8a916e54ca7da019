"""All tables in one command, and the report of them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from benchmarks.evaluate import method, robustness
from benchmarks.evaluate.options import MODULES, WORK, FeatureChoice, Out, Quick, Tasks, Work
from benchmarks.report import RESULTS
from saferedir_torch.world.prompts import CONCEPTS

app = typer.Typer()


@app.command()
def everything(
    tasks: Tasks = None,
    recorded: Annotated[
        Path | None,
        typer.Option(
            exists=True, file_okay=False, help="Folder of the benign trajectories that `calibrate` recorded, for the ablation."
        ),
    ] = None,
    few_step: Annotated[
        Path | None,
        typer.Option(exists=True, file_okay=False, help="Folder of a model of few steps, to try the module on as well."),
    ] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Only say how long each table takes here, and at 15 ms a step.")] = False,
    quick: Quick = False,
    out: Out = RESULTS,
    work: Work = WORK,
    features: FeatureChoice = "auto",
) -> None:
    """Every table that is measured from shipped weights, and the report: six hours on two cores, --quick ten minutes on one.

    Attacks by gradient, other methods, other models and relations have commands of their own.

    Example: `python -m benchmarks.evaluate everything --quick --out runs/quick --work runs/quick`
    """
    from benchmarks.plan import ATTACKED_AT, STEP_SECONDS, step_seconds
    from benchmarks.plan import plan as planned

    if plan:
        for seconds in (STEP_SECONDS, step_seconds()):
            typer.echo(planned(seconds))
        return
    for table in (method.envelope, method.unfamiliar, method.settings, robustness.amplified):
        table(quick=quick, out=out, work=work)
    for task in tasks or CONCEPTS:
        method.forgetting(task=task, quick=quick, out=out, work=work, features=features)
        for steps in ATTACKED_AT if not quick else (4,):
            robustness.attacks(task=task, steps=steps, quick=quick, out=out, work=work)
    method.interference(quick=quick, out=out, work=work, features=features)
    if (MODULES / "teddy").is_dir():
        method.added(quick=quick, out=out, work=work, features=features)
    else:
        typer.echo(f"added: left out, since {MODULES / 'teddy'} holds no branch")
    method.ablation(recorded=recorded, quick=quick, out=out, work=work)
    method.words(out=out)
    if few_step is not None:
        robustness.transfer(model=[f"few-step={few_step}"], quick=quick, out=out, work=work, features=features)
    method.report(out=out)
