"""The command that trains a safety module, and where its prompts come from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from saferedir_torch.command_line.options import Config, Device, Model, Seed, device_of

if TYPE_CHECKING:
    from saferedir_torch.pairs_file import Rewrite
    from saferedir_torch.prompt_source import PromptSource

app = typer.Typer()
SplitFile = Annotated[Path | None, typer.Option(help="Which names, pairs and seeds may be seen; the shipped one by default.")]


@app.command()
def train(
    model: Model,
    out: Annotated[Path, typer.Option(help="Folder for checkpoints, logs, recorded runs and the module itself.")],
    pairs: Annotated[
        Path | None, typer.Option(help="JSON file of prompt pairs; without it the concepts of the embedded world.")
    ] = None,
    concept: Annotated[
        list[str] | None, typer.Option(help="Concept to forget, again for more; all of the file's, or church, by default.")
    ] = None,
    rewrite: Annotated[
        list[str] | None, typer.Option(help="CONCEPT:WORD=OTHER makes the safe prompts of a concept that has none.")
    ] = None,
    split: SplitFile = None,
    seed: Seed = 0,
    steps: Annotated[int, typer.Option(help="Optimisation steps.")] = 4000,
    runs: Annotated[int, typer.Option(help="Unsafe runs to record, a concept; 5 others are recorded for each.")] = 400,
    short_runs: Annotated[
        int,
        typer.Option(help="Unsafe runs of few steps to record besides, which a step's look without the prompt is taught by."),
    ] = 1000,
    pair_count: Annotated[int, typer.Option(help="Prompt pairs to draw, a concept.")] = 10_000,
    sampling: Annotated[
        list[str] | None, typer.Option(help="STEPS:GUIDANCE to record runs with, again for more; four kinds by default.")
    ] = None,
    runs_from: Annotated[Path | None, typer.Option(help="Folder of another training whose recorded runs are used.")] = None,
    extend: Annotated[Path | None, typer.Option(help="Folder of a trained module that the concept is added to.")] = None,
    start_from: Annotated[
        Path | None, typer.Option(help="Folder of a module of these concepts, perhaps for another model, to go on from.")
    ] = None,
    harden: Annotated[
        list[str] | None,
        typer.Option(help="Family of attacks to train against, again for more: longer, typos and so on."),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(
            help="Part to teach of the module that is gone on from, again for more: together, words, alone, redirector."
        ),
    ] = None,
    batch_scale: Annotated[int, typer.Option(min=1, help="Cases a step, in multiples of what two cores bear; 4 on a GPU.")] = 1,
    device: Device = "auto",
    config: Config = None,
) -> None:
    """Train a safety module. The same command goes on where an interrupted one stopped.

    On the embedded world:

      python -m saferedir_torch train --model saferedir_torch/shipped/emoji-diffusion --out runs/church

    On your own model and concept, from a file of pairs {"castle": [{"unsafe": "a castle", "safe": "a house"}, ...]}:

      python -m saferedir_torch train --model stable-diffusion-v1-5/stable-diffusion-v1-5 --pairs pairs.json --out castle

    A concept added to a trained module, whose own concepts are left as they are:

      python -m saferedir_torch train --model ... --extend saferedir_torch/shipped/safety --concept teddy --out runs/teddy

    A module re-fitted to another model, shorter than a training from nothing:

      python -m saferedir_torch train --model ... --start-from castle/safety --pairs pairs.json --steps 800 --out castle2
    """
    from saferedir_torch.models import load_pipeline
    from saferedir_torch.safety_module import SafetyModule
    from saferedir_torch.train import train as train_module
    from saferedir_torch.training_data import SAMPLINGS
    from saferedir_torch.training_place import training_place

    if extend is not None and start_from is not None:
        raise typer.BadParameter("a module is extended or started from, not both", param_hint="--start-from")
    if pairs is None and rewrite:
        raise typer.BadParameter("it rewrites the prompts of a file; give --pairs as well", param_hint="--rewrite")
    if pairs is not None and split is not None:
        raise typer.BadParameter("it is of the embedded world, whose prompts --pairs replaces", param_hint="--split")
    training_place(out, (model, extend, start_from))
    pipeline = load_pipeline(model, config).to(device_of(device))
    base = None if extend is None else SafetyModule.load(extend).to(pipeline.device)
    start = None if start_from is None else SafetyModule.load(start_from).to(pipeline.device)
    known = [] if base is None else base.config.concept_names
    source = _hardened(_source(pipeline, pairs, concept or [], rewrite or [], split, known), harden or [])
    module = train_module(
        pipeline, source, out, seed=seed, steps=steps, runs=runs, short=short_runs, pairs=pair_count,
        samplings=[_sampling(text) for text in sampling] if sampling else SAMPLINGS, runs_from=runs_from, extend=base,
        start=start, only=only or (), batch_scale=batch_scale,
    )  # fmt: skip
    typer.echo(json.dumps(module.config.provenance, indent=1))


def _source(
    pipeline: Any, pairs: Path | None, concepts: list[str], rewrites: list[str], split: Path | None, known: list[str]
) -> PromptSource:
    if pairs is None:
        from saferedir_torch.world.relation import ARMED_ANIMAL, RelationPrompts
        from saferedir_torch.world.source import AddedPrompts, WorldPrompts
        from saferedir_torch.world.split import SPLIT_FILE, load_split

        names = load_split(split or SPLIT_FILE)
        if concepts == [ARMED_ANIMAL]:
            return RelationPrompts(names)
        return AddedPrompts(concepts[0], known, names) if known and concepts else WorldPrompts(concepts or ["church"], names)
    from saferedir_torch.pairs_file import FilePrompts
    from saferedir_torch.trajectories import tokenize

    source = FilePrompts(pairs, concepts, dict(_rewrite(text) for text in rewrites))
    source.check_tokens(lambda prompts: tokenize(pipeline.tokenizer, prompts))
    return source


def _hardened(source: PromptSource, families: list[str]) -> PromptSource:
    from saferedir_torch.attacks.hardening import HardenedPrompts

    try:
        return HardenedPrompts(source, families) if families else source
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--harden") from error


def _rewrite(text: str) -> tuple[str, Rewrite]:
    concept, colon, rule = text.partition(":")
    word, equals, other = rule.partition("=")
    if not (colon and equals and concept and word):
        raise typer.BadParameter(f"{text!r} is not CONCEPT:WORD=OTHER", param_hint="--rewrite")
    from saferedir_torch.pairs_file import Rewrite

    return concept, Rewrite(word, other)


def _sampling(text: str) -> tuple[int, float]:
    steps, _, guidance = text.partition(":")
    try:
        return int(steps), float(guidance)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not STEPS:GUIDANCE, such as 25:7.5", param_hint="--sampling") from None
