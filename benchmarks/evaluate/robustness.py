"""What the shipped safety withstands and where it goes: attacks, peers, other models."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.drawing import DEPLOYED, USUAL, Studio
from benchmarks.evaluate.options import WORK, FeatureChoice, Out, Quick, Task, Work, load_chosen, store
from benchmarks.report import NETWORKS, RESULTS
from saferedir.runtime import Pipeline
from saferedir_torch.models import SHIPPED_SAFETY, device_called, load_pipeline
from saferedir_torch.safety_module import SafetyModule
from saferedir_torch.world.prompts import CONCEPTS
from saferedir_torch.world.split import load_split

app = typer.Typer()


@app.command()
def attacks(
    task: Task = "church",
    safety: Annotated[Path | None, typer.Option(help="Folder of another module; results are stored under its name.")] = None,
    prompts: Annotated[int, typer.Option(help="Prompts a family.")] = 120,
    seeds: Annotated[int, typer.Option(help="Seeds a prompt.")] = 4,
    at_least: Annotated[int, typer.Option(help="Pictures that must show the concept without safety; fewer: no attack.")] = 50,
    steps: Annotated[int, typer.Option(help="Denoising steps; others than 25 are named in the result's name.")] = 25,
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
    size = replace(QUICK if quick else Size(prompts, seeds, at_least), steps=steps)
    name = f"attacks_{task}" + ("" if steps == USUAL.steps else f"_{steps}_steps")
    name = "_".join([name, *(own.replace(", ", "_").replace(" ", "_") for own in family or [])])
    drawer, identity, stated = Pipeline.from_bundle(), DEPLOYED, {}
    if safety is not None:
        module = SafetyModule.load(safety)
        drawer, identity, stated = hybrid_pipeline(module), module.sha256(), {"module": _title_of(safety)}
        name = f"{_title_of(safety)}_{name}"
    figures = measure(
        Studio(work), drawer, identity, CONCEPTS[task], load_split(), size, out / f"{name}_worst.png", family or ()
    )
    store(name, stated | figures, out)


@app.command()
def amplified(quick: Quick = False, out: Out = RESULTS, work: Work = WORK) -> None:
    """ASR of embeddings with a little of a concept in them, which guidance against the safe prompt amplifies."""
    from benchmarks.tables.amplified import QUICK, Size
    from benchmarks.tables.amplified import amplified as measure

    size = QUICK if quick else Size()
    store("amplified", measure(Studio(work), Pipeline.from_bundle(), DEPLOYED, load_split(), size), out)


@app.command()
def gradient_attacks(
    task: Task = "church",
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
    store(f"gradient_attacks_{task}", figures, out)


@app.command()
def peers(
    task: Task = "church",
    runs: Annotated[
        Path | None,
        typer.Option(
            help="Folder of a training whose recorded runs the published network learns from, which then is one of the methods."
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto: the GPU where there is one.")] = "auto",
    quick: Quick = False,
    out: Out = RESULTS,
    work: Work = WORK,
    features: FeatureChoice = "auto",
) -> None:
    """Other methods on the same model, each at its best setting on validation prompts. Hours on a CPU, minutes on a GPU."""
    from benchmarks.published_training import STEPS, train_published
    from benchmarks.tables.peers import QUICK, Size
    from benchmarks.tables.peers import peers as measure

    model, module, split = load_pipeline().to(device_called(device)), SafetyModule.load(SHIPPED_SAFETY), load_split()
    size, steps = (QUICK, 2) if quick else (Size(), STEPS)
    published = None
    if runs is not None:
        published = train_published(model, task, split, runs, work / f"published_{task}", steps)
    figures = measure(Studio(work), model, module, published, CONCEPTS[task], split, load_chosen(features), NETWORKS, size)
    store(f"peers_{task}", figures, out)


@app.command()
def transfer(
    model: Annotated[list[str], typer.Option(help="TITLE=FOLDER of a model to try the safety on, again for more.")],
    refitted: Annotated[list[str] | None, typer.Option(help="TITLE=FOLDER of a module that was fitted to it.")] = None,
    judge: Annotated[list[str] | None, typer.Option(help="TITLE=FOLDER of a judge that knows its kind of pictures.")] = None,
    prompts: Annotated[int, typer.Option(help="Prompts of seen names, and of held-out ones.")] = 30,
    seeds: Annotated[int, typer.Option(help="Seeds a prompt.")] = 5,
    quick: Quick = False,
    out: Out = RESULTS,
    work: Work = WORK,
    features: FeatureChoice = "auto",
) -> None:
    """The shipped module on other models, such as `python -m saferedir_torch.world fine-tune` and `architecture` make:
    unchanged, and as `saferedir calibrate` or `train --start-from` fits it to them."""
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
    store("transfer", measure(Studio(work), subjects, module, load_split(), load_chosen(features), size), out)


def _title_of(safety: Path) -> str:
    """What a module is called: its folder, or the one that training made it in."""
    return safety.parent.name if safety.name == "safety" else safety.name


def _folders(entries: list[str], option: str) -> dict[str, Path]:
    """Folders by the title that TITLE=FOLDER gives them."""
    named = {}
    for entry in entries:
        title, equals, folder = entry.partition("=")
        if not equals or not Path(folder).is_dir():
            raise typer.BadParameter(f"{entry!r} is not TITLE=FOLDER with a folder that exists", param_hint=option)
        named[title] = Path(folder)
    return named
