"""Modules that are trained to be compared: inputs and parts left out, other splits, families and concepts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from benchmarks.drawing import Studio
from benchmarks.evaluate.options import WORK, FeatureChoice, Out, Quick, Work, load_chosen, rewrites, store
from benchmarks.report import RESULTS
from saferedir_torch.models import device_called, load_pipeline
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


@app.command()
def generalisation(
    runs: Annotated[Path, typer.Option(help="Folder of the training whose recorded runs the modules learn from.")],
    quick: Quick = False,
    out: Out = RESULTS,
    work: Work = WORK,
) -> None:
    """Adversarial training with one family of attacks left out, each in turn: eight modules of one concept are trained."""
    from benchmarks.tables.generalisation import QUICK, Size
    from benchmarks.tables.generalisation import generalisation as measure

    size = QUICK if quick else Size()
    figures = measure(Studio(work), load_pipeline(), load_split(), runs, work / "generalisation", size)
    store("generalisation", figures, out)


@app.command()
def detection(
    runs: Annotated[Path, typer.Option(help="Folder of the training whose recorded runs the detectors learn from.")],
    quick: Quick = False,
    out: Out = RESULTS,
    work: Work = WORK,
) -> None:
    """What latent and timestep add over the text: three detectors trained on the same data. About 40 minutes."""
    from benchmarks.tables.detection import FULL, QUICK, STEPS
    from benchmarks.tables.detection import detection as measure

    count, steps = (QUICK, 3) if quick else (FULL, STEPS)
    store("detection", measure(load_pipeline(), load_split(), runs, work / "detection", count, steps), out)


@app.command()
def ablation(
    runs: Annotated[Path, typer.Option(help="Folder of the training whose recorded runs the variants learn from.")],
    quick: Quick = False,
    out: Out = RESULTS,
    work: Work = WORK,
    features: FeatureChoice = "auto",
) -> None:
    """One part of the redirector left out at a time, and the published network, trained on the same data. About 2 hours."""
    from benchmarks.tables.ablation import FULL, QUICK, STEPS
    from benchmarks.tables.ablation import ablation as measure

    count, steps = (QUICK, 3) if quick else (FULL, STEPS)
    figures = measure(
        Studio(work), load_pipeline(), load_split(), runs, work / "ablation", load_chosen(features), count, rewrites(quick),
        steps,
    )  # fmt: skip
    store("ablation", figures, out)


@app.command()
def splits(
    runs: Annotated[Path, typer.Option(help="Folder of the training whose runs of other concepts are used as well.")],
    quick: Quick = False,
    out: Out = RESULTS,
    work: Work = WORK,
) -> None:
    """Five splits of the names of one concept, a module trained for each. About 3 hours."""
    from benchmarks.tables.splits import FULL, PAIRS, QUICK, RUNS, STEPS
    from benchmarks.tables.splits import splits as measure

    amount = {"steps": 3, "count": 8, "pairs": 20} if quick else {"steps": STEPS, "count": RUNS, "pairs": PAIRS}
    figures = measure(
        Studio(work), load_pipeline().to(device_called("auto")), load_split(), runs, work / "splits",
        prompts=QUICK if quick else FULL, rewrites=rewrites(quick), **amount,
    )  # fmt: skip
    store("splits", figures, out)
