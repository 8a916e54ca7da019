"""What the method itself comes to: forgetting, what is left alone, what each mechanism is for, concepts together."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from benchmarks.drawing import DEPLOYED, Studio
from benchmarks.evaluate.options import (
    MODULES,
    WORK,
    FeatureChoice,
    Out,
    Quick,
    Task,
    Work,
    load_chosen,
    rewrites,
    shipped,
    store,
)
from benchmarks.report import NETWORKS, RESULTS
from saferedir.runtime import Pipeline
from saferedir_torch.models import SHIPPED_SAFETY
from saferedir_torch.safety_module import SafetyModule
from saferedir_torch.world.prompts import CONCEPTS
from saferedir_torch.world.split import load_split

app = typer.Typer()


@app.command()
def forgetting(
    task: Task = "church",
    alone: Annotated[bool, typer.Option("--alone", help="The module of this concept alone.")] = False,
    quick: Quick = False,
    out: Out = RESULTS,
    work: Work = WORK,
    features: FeatureChoice = "auto",
) -> None:
    """FSR by name, CSDR, LPIPS, FID, what is kept, also where the words are not heard: seen and held-out names.

    Example: `python -m benchmarks.evaluate forgetting --task ink`
    """
    from benchmarks.hybrid import hybrid_pipeline
    from benchmarks.mechanisms import by_picture
    from benchmarks.tables.forgetting import QUICK, Size
    from benchmarks.tables.forgetting import forgetting as measure

    if alone:
        module = SafetyModule.load(MODULES / task)
        drawer, identity, deaf = hybrid_pipeline(module), module.sha256(), None
    else:
        drawer, identity, deaf = Pipeline.from_bundle(), DEPLOYED, by_picture(shipped()[0])
    size = QUICK if quick else Size()
    name = "forgetting" + ("_alone" if alone else "") + f"_{task}"
    figures = measure(
        Studio(work), drawer, identity, CONCEPTS[task], load_split(), load_chosen(features), size, out / name, deaf
    )
    store(name, figures, out)


@app.command()
def settings(quick: Quick = False, out: Out = RESULTS, work: Work = WORK) -> None:
    """FSR at every number of steps with every sampler."""
    from benchmarks.tables.settings import QUICK, Size
    from benchmarks.tables.settings import settings as measure

    size = QUICK if quick else Size()
    store("settings", measure(Studio(work), Pipeline.from_bundle(), DEPLOYED, load_split(), size), out)


@app.command()
def envelope(quick: Quick = False, out: Out = RESULTS, work: Work = WORK) -> None:
    """False fires among 3,000 benign pictures, drawn in every way, and in the first step of many more."""
    from benchmarks.tables.envelope import QUICK, Size
    from benchmarks.tables.envelope import envelope as measure
    from saferedir_torch.world.judge import Judge

    size, judge = QUICK if quick else Size(), Judge.load(NETWORKS / "judge")
    store("envelope", measure(Studio(work), Pipeline.from_bundle(), DEPLOYED, load_split(), judge, size), out)


@app.command()
def unfamiliar(quick: Quick = False, out: Out = RESULTS, work: Work = WORK) -> None:
    """Prompts that nobody was taught: everyday ones, foreign domains, languages, empty and very long ones."""
    from benchmarks.tables.unfamiliar import QUICK, Size
    from benchmarks.tables.unfamiliar import unfamiliar as measure

    size = QUICK if quick else Size()
    store("unfamiliar", measure(Studio(work), Pipeline.from_bundle(), DEPLOYED, load_split(), size), out)


@app.command()
def interference(quick: Quick = False, out: Out = RESULTS, work: Work = WORK, features: FeatureChoice = "auto") -> None:
    """Concepts enabled x concepts asked for, and prompts that ask for several at once."""
    from benchmarks.tables.interference import FULL, QUICK
    from benchmarks.tables.interference import interference as measure

    count = QUICK if quick else FULL
    figures = measure(Studio(work), *shipped(), load_split(), load_chosen(features), count, rewrites(quick))
    store("interference", figures, out)


@app.command()
def ablation(
    recorded: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            file_okay=False,
            help="Folder of the benign trajectories that `calibrate` recorded, to set thresholds on again; kept without it.",
        ),
    ] = None,
    quick: Quick = False,
    out: Out = RESULTS,
    work: Work = WORK,
) -> None:
    """The shipped module with one mechanism left out at a time, set to the same promise again."""
    from benchmarks.tables.ablation import QUICK, Size
    from benchmarks.tables.ablation import ablation as measure

    size = QUICK if quick else Size()
    store("ablation", measure(Studio(work), shipped()[0], load_split(), size, recorded), out)


@app.command()
def statistic(
    benign: Annotated[Path, typer.Option(exists=True, file_okay=False, help="Folder of pictures that `calibrate` recorded.")],
    runs: Annotated[Path, typer.Option(exists=True, file_okay=False, help="Folder of the training of the shipped module.")],
    out: Out = RESULTS,
) -> None:
    """The highest step of a run, or a sequential sum? What each detects of held-out runs at the same promise. Minutes.

    Example: `python -m benchmarks.evaluate statistic --benign runs/benign/bound --runs runs/shipped`
    """
    from benchmarks.tables.statistic import statistic as measure
    from saferedir_torch.runs import runs_in

    module, _ = shipped()
    store("statistic", measure(module, runs_in(benign), runs_in(runs), module.config.provenance["seed"]), out)


@app.command()
def words(out: Out = RESULTS) -> None:
    """Scores over the steps and masks over the words of the demonstration's prompts. Seconds."""
    from benchmarks.tables.words import words as measure

    store("words", measure(Pipeline.from_bundle(), out), out)


@app.command()
def added(quick: Quick = False, out: Out = RESULTS, work: Work = WORK, features: FeatureChoice = "auto") -> None:
    """A fourth concept added to the shipped module: its FSR, and that nothing changed for the others."""
    from benchmarks.added_branch import load_with_branch
    from benchmarks.tables.added import FULL, FULL_SIZE, QUICK
    from benchmarks.tables.added import added as measure
    from benchmarks.tables.forgetting import QUICK as QUICK_SIZE

    base = SafetyModule.load(SHIPPED_SAFETY)
    extended = load_with_branch(base, MODULES / "teddy")
    size, count = (QUICK_SIZE, QUICK) if quick else (FULL_SIZE, FULL)
    store("added", measure(Studio(work), base, extended, load_split(), load_chosen(features), size, count, out), out)


@app.command()
def report(out: Out = RESULTS) -> None:
    """All results in the folder as one page, `report.html`, with plots and contact sheets, and as one `report.json`."""
    from benchmarks.html_report import write_report

    typer.echo(write_report(out))
