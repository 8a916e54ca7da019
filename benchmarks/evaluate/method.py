"""What the method itself comes to: forgetting, what is left alone, strength, cooldown, concepts together."""

from __future__ import annotations

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
from benchmarks.report import RESULTS
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
    """FSR by name, CSDR, LPIPS, FID, what is kept: seen and held-out names. About 25 minutes on two cores.

    Example: `python -m benchmarks.evaluate forgetting --task ink`
    """
    from benchmarks.hybrid import hybrid_pipeline
    from benchmarks.tables.forgetting import QUICK, Size
    from benchmarks.tables.forgetting import forgetting as measure

    if alone:
        module = SafetyModule.load(MODULES / task)
        drawer, identity = hybrid_pipeline(module), module.sha256()
    else:
        drawer, identity = Pipeline.from_bundle(), DEPLOYED
    size = QUICK if quick else Size()
    name = "forgetting" + ("_alone" if alone else "") + f"_{task}"
    figures = measure(Studio(work), drawer, identity, CONCEPTS[task], load_split(), load_chosen(features), size, out / name)
    store(name, figures, out)


@app.command()
def benign(quick: Quick = False, out: Out = RESULTS, work: Work = WORK, features: FeatureChoice = "auto") -> None:
    """False fires among 3,000 benign prompts, half of them near neighbours. About 17 minutes."""
    from benchmarks.tables.benign import FULL, QUICK
    from benchmarks.tables.benign import benign as measure

    count = QUICK if quick else FULL
    store("benign", measure(Studio(work), Pipeline.from_bundle(), DEPLOYED, load_split(), load_chosen(features), count), out)


@app.command()
def unfamiliar(quick: Quick = False, out: Out = RESULTS, work: Work = WORK) -> None:
    """Foreign domains, languages, empty and very long prompts. About 2 minutes."""
    from benchmarks.tables.unfamiliar import FULL, QUICK
    from benchmarks.tables.unfamiliar import unfamiliar as measure

    size = QUICK if quick else FULL
    figures = measure(Studio(work), Pipeline.from_bundle(), DEPLOYED, load_split(), size, rewrites(quick))
    store("unfamiliar", figures, out)


@app.command()
def interference(quick: Quick = False, out: Out = RESULTS, work: Work = WORK, features: FeatureChoice = "auto") -> None:
    """Concepts enabled x concepts asked for, and prompts that ask for several at once. About 10 minutes."""
    from benchmarks.tables.interference import FULL, QUICK
    from benchmarks.tables.interference import interference as measure

    count = QUICK if quick else FULL
    figures = measure(Studio(work), *shipped(), load_split(), load_chosen(features), count, rewrites(quick))
    store("interference", figures, out)


@app.command()
def choose_strength(quick: Quick = False, out: Out = RESULTS, work: Work = WORK, features: FeatureChoice = "auto") -> None:
    """The strength of each concept, chosen on validation pictures, as `calibrate --strength` takes it."""
    from benchmarks.tables.strength_choice import FULL, QUICK, strength_choice

    module, _ = shipped()
    count = QUICK if quick else FULL
    store("strength_choice", strength_choice(Studio(work), module, load_split(), load_chosen(features), count), out)


@app.command()
def cooldown(quick: Quick = False, out: Out = RESULTS, work: Work = WORK, features: FeatureChoice = "auto") -> None:
    """Cooldown 0 to 10: oscillation, firings, FSR. About 7 minutes."""
    from benchmarks.tables.cooldown import FULL, QUICK
    from benchmarks.tables.cooldown import cooldown as measure

    count = QUICK if quick else FULL
    figures = measure(Studio(work), *shipped(), load_split(), load_chosen(features), count, rewrites(quick))
    store("cooldown", figures, out)


@app.command()
def words(out: Out = RESULTS) -> None:
    """Scores over the steps and masks over the words of the demonstration's prompts. Seconds."""
    from benchmarks.tables.words import words as measure

    store("words", measure(Pipeline.from_bundle(), out), out)


@app.command()
def added(quick: Quick = False, out: Out = RESULTS, work: Work = WORK, features: FeatureChoice = "auto") -> None:
    """A fourth concept added to the shipped module: its FSR, and that nothing changed for the others. About 10 minutes."""
    from benchmarks.added_branch import load_with_branch
    from benchmarks.tables.added import FULL, QUICK
    from benchmarks.tables.added import added as measure
    from benchmarks.tables.forgetting import QUICK as QUICK_SIZE
    from benchmarks.tables.forgetting import Size

    base = SafetyModule.load(SHIPPED_SAFETY)
    extended = load_with_branch(base, MODULES / "teddy")
    size = QUICK_SIZE if quick else Size(prompts=100, per_prompt=3)
    count = QUICK if quick else FULL
    store("added", measure(Studio(work), base, extended, load_split(), load_chosen(features), size, count, out), out)


@app.command()
def report(out: Out = RESULTS) -> None:
    """All results in the folder as one page, `report.html`, with plots and contact sheets, and as one `report.json`."""
    from benchmarks.html_report import write_report

    typer.echo(write_report(out))
