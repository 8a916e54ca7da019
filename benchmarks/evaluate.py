"""The evaluation, one command a table: `python -m benchmarks.evaluate --help`. An interrupted one goes on where it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.drawing import DEPLOYED, Studio
from benchmarks.earlier_results import EarlierResultError, entries_of_others, tried_settings
from benchmarks.report import NETWORKS, RESULTS, save
from saferedir.runtime import Pipeline
from saferedir_torch.evaluation.features import Choice, load_features
from saferedir_torch.models import SHIPPED_SAFETY, device_called, load_pipeline
from saferedir_torch.safety_module import SafetyModule
from saferedir_torch.world.prompts import CONCEPTS
from saferedir_torch.world.split import load_split

app = typer.Typer(help="Measure the shipped safety: one command a table, results as JSON.", no_args_is_help=True)
Quick = Annotated[bool, typer.Option("--quick", help="A few pictures of everything: does it run, not how good it is.")]
Out = Annotated[Path, typer.Option(help="Folder for the results.")]
Work = Annotated[Path, typer.Option(help="Folder where drawn pictures are kept, for resuming.")]
FeatureChoice = Annotated[str, typer.Option("--features", help="real, world, or auto: real where the weights are.")]
WORK = Path("runs/evaluation")
#: Modules that are measured beside the shipped one.
MODULES = Path(__file__).with_name("modules")
QUICK_REWRITES, REWRITES = 12, 1000


@app.command()
def forgetting(
    task: Annotated[str, typer.Option(help=f"One of {', '.join(CONCEPTS)}.")] = "church",
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
    figures = measure(Studio(work), drawer, identity, CONCEPTS[task], load_split(), _features(features), size, out / name)
    _store(name, figures, out)


@app.command()
def benign(quick: Quick = False, out: Out = RESULTS, work: Work = WORK, features: FeatureChoice = "auto") -> None:
    """False fires among 3,000 benign prompts, half of them near neighbours. About 17 minutes."""
    from benchmarks.tables.benign import FULL, QUICK
    from benchmarks.tables.benign import benign as measure

    count = QUICK if quick else FULL
    _store("benign", measure(Studio(work), Pipeline.from_bundle(), DEPLOYED, load_split(), _features(features), count), out)


@app.command()
def unfamiliar(quick: Quick = False, out: Out = RESULTS, work: Work = WORK) -> None:
    """Foreign domains, languages, empty and very long prompts. About 2 minutes."""
    from benchmarks.tables.unfamiliar import FULL, QUICK
    from benchmarks.tables.unfamiliar import unfamiliar as measure

    size = QUICK if quick else FULL
    figures = measure(Studio(work), Pipeline.from_bundle(), DEPLOYED, load_split(), size, _rewrites(quick))
    _store("unfamiliar", figures, out)


@app.command()
def interference(quick: Quick = False, out: Out = RESULTS, work: Work = WORK, features: FeatureChoice = "auto") -> None:
    """Concepts enabled x concepts asked for, and prompts that ask for several at once. About 10 minutes."""
    from benchmarks.tables.interference import FULL, QUICK
    from benchmarks.tables.interference import interference as measure

    _store("interference", measure(Studio(work), *_shipped(), load_split(), _features(features), QUICK if quick else FULL,
                                   _rewrites(quick)), out)  # fmt: skip


@app.command()
def strength(quick: Quick = False, out: Out = RESULTS, work: Work = WORK, features: FeatureChoice = "auto") -> None:
    """Fixed strengths from 0.5 to 3 against the adaptive one, on held-out names. About 12 minutes."""
    from benchmarks.tables.strength import FULL, QUICK
    from benchmarks.tables.strength import strength as measure

    _store("strength", measure(Studio(work), *_shipped(), load_split(), _features(features), QUICK if quick else FULL,
                               _rewrites(quick)), out)  # fmt: skip


@app.command()
def choose_strength(quick: Quick = False, out: Out = RESULTS, work: Work = WORK, features: FeatureChoice = "auto") -> None:
    """The strength of each concept, chosen on validation pictures, as `calibrate --strength` takes it."""
    from benchmarks.tables.strength_choice import FULL, QUICK, strength_choice

    module, _ = _shipped()
    count = QUICK if quick else FULL
    _store("strength_choice", strength_choice(Studio(work), module, load_split(), _features(features), count), out)


@app.command()
def cooldown(quick: Quick = False, out: Out = RESULTS, work: Work = WORK, features: FeatureChoice = "auto") -> None:
    """Cooldown 0 to 10: oscillation, firings, FSR. About 7 minutes."""
    from benchmarks.tables.cooldown import FULL, QUICK
    from benchmarks.tables.cooldown import cooldown as measure

    _store("cooldown", measure(Studio(work), *_shipped(), load_split(), _features(features), QUICK if quick else FULL,
                               _rewrites(quick)), out)  # fmt: skip


@app.command()
def attacks(
    task: Annotated[str, typer.Option(help=f"One of {', '.join(CONCEPTS)}.")] = "church",
    safety: Annotated[Path | None, typer.Option(help="Folder of another module; results are stored under its name.")] = None,
    prompts: Annotated[int, typer.Option(help="Prompts a family.")] = 120,
    seeds: Annotated[int, typer.Option(help="Seeds a prompt.")] = 8,
    at_least: Annotated[int, typer.Option(help="Pictures that must show the concept without safety; fewer: no attack.")] = 300,
    family: Annotated[
        list[str] | None, typer.Option(help="Only this family, again for more; stored under their names.")
    ] = None,
    quick: Quick = False,
    out: Out = RESULTS,
    work: Work = WORK,
) -> None:
    """ASR of prompts that hide what they ask for, by family: typos, lookalike letters, injection and so on.

    Example, a first look at a new module: `python -m benchmarks.evaluate attacks --safety runs/new/safety --prompts 20
    --seeds 3 --at-least 30 --out runs/new` writes `new_attacks_church.json`
    """
    from benchmarks.hybrid import hybrid_pipeline
    from benchmarks.tables.attacks import ALL_FAMILIES, QUICK, Size
    from benchmarks.tables.attacks import attacks as measure

    if unknown := sorted(set(family or []) - set(ALL_FAMILIES)):
        raise typer.BadParameter(f"{unknown[0]!r} is none of {'; '.join(ALL_FAMILIES)}", param_hint="--family")
    size, name = QUICK if quick else Size(prompts, seeds, at_least), f"attacks_{task}"
    name = "_".join([name, *(own.replace(", ", "_").replace(" ", "_") for own in family or [])])
    drawer, identity, stated = Pipeline.from_bundle(), DEPLOYED, {}
    if safety is not None:
        module = SafetyModule.load(safety)
        drawer, identity, stated = hybrid_pipeline(module), module.sha256(), {"module": _title_of(safety)}
        name = f"{_title_of(safety)}_{name}"
    figures = measure(
        Studio(work), drawer, identity, CONCEPTS[task], load_split(), size, out / f"{name}_worst.png", family or ()
    )
    _store(name, stated | figures, out)


def _title_of(safety: Path) -> str:
    """What a module is called: its folder, or the one that training made it in."""
    return safety.parent.name if safety.name == "safety" else safety.name


@app.command()
def gradient_attacks(
    task: Annotated[str, typer.Option(help=f"One of {', '.join(CONCEPTS)}.")] = "church",
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto: the GPU where there is one.")] = "auto",
    quick: Quick = False,
    out: Out = RESULTS,
    work: Work = WORK,
) -> None:
    """ASR of words and embeddings that are searched by gradient, through the protected model and without. Hours on a CPU."""
    from benchmarks.tables.gradient_attacks import QUICK, Size
    from benchmarks.tables.gradient_attacks import gradient_attacks as measure

    size, module = QUICK if quick else Size(), SafetyModule.load(SHIPPED_SAFETY)
    figures = measure(
        Studio(work), Pipeline.from_bundle(), DEPLOYED, load_pipeline().to(device_called(device)), module, CONCEPTS[task],
        load_split(), size, out / f"gradient_attacks_{task}_worst.png",
    )  # fmt: skip
    _store(f"gradient_attacks_{task}", figures, out)


@app.command()
def peers(
    runs: Annotated[Path, typer.Option(help="Folder of the training whose recorded runs the published network learns from.")],
    task: Annotated[str, typer.Option(help=f"One of {', '.join(CONCEPTS)}.")] = "church",
    settings_from: Annotated[
        Path | None, typer.Option(help="Earlier result of this task, whose best settings are taken and not all tried again.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto: the GPU where there is one.")] = "auto",
    quick: Quick = False,
    out: Out = RESULTS,
    work: Work = WORK,
    features: FeatureChoice = "auto",
) -> None:
    """Other methods on the same model, each at its best setting on validation prompts. Hours on a CPU, minutes on a GPU."""
    from benchmarks.tables.ablation import STEPS, Lessons, train_published
    from benchmarks.tables.peers import QUICK, Size
    from benchmarks.tables.peers import peers as measure

    try:
        tried = tried_settings(settings_from, task) if settings_from is not None else {}
    except EarlierResultError as error:
        raise typer.BadParameter(str(error), param_hint="--settings-from") from None
    model, module, split = load_pipeline().to(device_called(device)), SafetyModule.load(SHIPPED_SAFETY), load_split()
    size, steps = (QUICK, 2) if quick else (Size(), STEPS)
    published = train_published(Lessons.untaught(model, task, split, runs, work / f"published_{task}", steps))
    figures = measure(Studio(work), model, module, published, CONCEPTS[task], split, _features(features), NETWORKS, size, tried)
    _store(f"peers_{task}", figures, out)


@app.command()
def transfer(
    model: Annotated[list[str], typer.Option(help="TITLE=FOLDER of a model to try the safety on, again for more.")],
    refitted: Annotated[list[str] | None, typer.Option(help="TITLE=FOLDER of a module that was re-fitted to it.")] = None,
    judge: Annotated[list[str] | None, typer.Option(help="TITLE=FOLDER of a judge that knows its kind of pictures.")] = None,
    prompts: Annotated[int, typer.Option(help="Prompts of seen names, and of held-out ones.")] = 30,
    seeds: Annotated[int, typer.Option(help="Seeds a prompt.")] = 5,
    add_to: Annotated[
        Path | None, typer.Option(help="Earlier result of this module, whose other models are taken over as they are.")
    ] = None,
    quick: Quick = False,
    out: Out = RESULTS,
    work: Work = WORK,
    features: FeatureChoice = "auto",
) -> None:
    """The shipped module on other models, such as `python -m saferedir_torch.world fine-tune` and `architecture` make:
    unchanged, and as `python -m saferedir_torch train --start-from` re-fits it."""
    from benchmarks.tables.transfer import QUICK, Size, Subject
    from benchmarks.tables.transfer import transfer as measure
    from saferedir_torch.world.judge import JUDGE_FILE, Judge

    models, modules = _folders(model, "--model"), _folders(refitted or [], "--refitted")
    judges = _folders(judge or [], "--judge")
    for folder in judges.values():
        if not (folder / JUDGE_FILE).is_file():
            raise typer.BadParameter(f"{folder} holds no {JUDGE_FILE}", param_hint="--judge")
    for option, given in (("--refitted", modules), ("--judge", judges)):
        if stray := sorted(set(given) - set(models)):
            raise typer.BadParameter(f"{stray[0]!r} is no --model; expected one of {', '.join(models)}", param_hint=option)
    subjects = [
        Subject(
            title, folder, SafetyModule.load(modules[title]) if title in modules else None,
            Judge.load(judges[title]) if title in judges else None,
        )
        for title, folder in models.items()
    ]  # fmt: skip
    module, size = SafetyModule.load(SHIPPED_SAFETY), QUICK if quick else Size(prompts, seeds)
    try:
        earlier = entries_of_others(add_to, module, models) if add_to is not None else []
    except EarlierResultError as error:
        raise typer.BadParameter(str(error), param_hint="--add-to") from None
    figures = measure(Studio(work), subjects, module, load_split(), _features(features), size)
    _store("transfer", {**figures, "entries": earlier + figures["entries"]}, out)


def _folders(entries: list[str], option: str) -> dict[str, Path]:
    """Folders by the title that TITLE=FOLDER gives them."""
    named = {}
    for entry in entries:
        title, equals, folder = entry.partition("=")
        if not equals or not Path(folder).is_dir():
            raise typer.BadParameter(f"{entry!r} is not TITLE=FOLDER with a folder that exists", param_hint=option)
        named[title] = Path(folder)
    return named


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
    _store("relation", measure(Studio(work), load_pipeline(), SafetyModule.load(safety), load_split(), size), out)


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
    _store("generalisation", figures, out)


@app.command()
def first_step(quick: Quick = False, out: Out = RESULTS) -> None:
    """In which pictures of the other tables the first step's own levels change what fires. A minute, nothing is drawn."""
    from benchmarks.tables.first_step import first_step as measure

    _store("first_step", measure(load_pipeline(), _shipped()[0], load_split(), most=4 if quick else None), out)


@app.command()
def words(out: Out = RESULTS) -> None:
    """Scores over the steps and masks over the words of the demonstration's prompts. Seconds."""
    from benchmarks.tables.words import words as measure

    _store("words", measure(Pipeline.from_bundle(), out), out)


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
    _store("added", measure(Studio(work), base, extended, load_split(), _features(features), size, count, out), out)


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
    _store("detection", measure(load_pipeline(), load_split(), runs, work / "detection", count, steps), out)


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
    _store("ablation", measure(Studio(work), load_pipeline(), load_split(), runs, work / "ablation", _features(features), count,
                               _rewrites(quick), steps), out)  # fmt: skip


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
        prompts=QUICK if quick else FULL, rewrites=_rewrites(quick), **amount,
    )  # fmt: skip
    _store("splits", figures, out)


@app.command()
def report(out: Out = RESULTS) -> None:
    """All results in the folder as one page, `report.html`, with plots and contact sheets."""
    from benchmarks.html_report import write_report

    typer.echo(write_report(out))


def _features(choice: str) -> Any:
    given: Choice = choice  # type: ignore[assignment]
    return load_features(NETWORKS, given)


def _rewrites(quick: bool) -> int:
    return QUICK_REWRITES if quick else REWRITES


def _shipped() -> tuple[SafetyModule, str]:
    module = SafetyModule.load(SHIPPED_SAFETY)
    return module, module.sha256()


def _store(name: str, figures: dict[str, Any], out: Path) -> None:
    typer.echo(json.dumps(figures, indent=1)[:2000])
    typer.echo(save(name, figures, out))


if __name__ == "__main__":
    app()
