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
    style: Annotated[
        list[str] | None,
        typer.Option(help="Concept of the file that is how a subject is drawn, again for more: the subject is kept."),
    ] = None,
    split: SplitFile = None,
    seed: Seed = 0,
    steps: Annotated[int, typer.Option(min=1, help="Optimisation steps.")] = 6000,
    runs: Annotated[int, typer.Option(min=1, help="Runs to record, of all kinds and concepts, across the envelope.")] = 20_000,
    pair_count: Annotated[int, typer.Option(min=1, help="Prompt pairs to draw, a concept.")] = 8000,
    runs_from: Annotated[Path | None, typer.Option(help="Folder of another training whose recorded runs are used.")] = None,
    extend: Annotated[Path | None, typer.Option(help="Folder of a trained module that the concept is added to.")] = None,
    start_from: Annotated[
        Path | None, typer.Option(help="Folder of a module of these concepts, perhaps for another model, to go on from.")
    ] = None,
    harden: Annotated[
        bool, typer.Option(help="Put everyday words around prompts, and rewrite some as attackers would.")
    ] = True,
    batch_scale: Annotated[int, typer.Option(min=1, help="Cases a step, in multiples of what two cores bear; 4 on a GPU.")] = 1,
    device: Device = "auto",
    config: Config = None,
) -> None:
    """Train a safety module. The same command goes on where an interrupted one stopped.

    On the embedded world:

      saferedir train --model saferedir_torch/shipped/emoji-diffusion --out runs/church

    On your own model and concept, from a file of pairs {"castle": [{"unsafe": "a castle", "safe": "a house"}, ...]}:

      saferedir train --model stable-diffusion-v1-5/stable-diffusion-v1-5 --pairs pairs.json --out castle

    A concept added to a trained module, whose own concepts are left as they are:

      saferedir train --model ... --extend saferedir_torch/shipped/safety --concept teddy --out runs/teddy

    A module re-fitted to another model, shorter than a training from nothing:

      saferedir train --model ... --start-from castle/safety --pairs pairs.json --steps 800 --out castle2
    """
    from saferedir_torch.models import load_pipeline
    from saferedir_torch.safety_module import SafetyModule
    from saferedir_torch.train import train as train_module
    from saferedir_torch.training_place import training_place

    if extend is not None and start_from is not None:
        raise typer.BadParameter("a module is extended or started from, not both", param_hint="--start-from")
    for option, given in (("--rewrite", rewrite), ("--style", style)):
        if pairs is None and given:
            raise typer.BadParameter("it is of a file's concepts; give --pairs as well", param_hint=option)
    if pairs is not None and split is not None:
        raise typer.BadParameter("it is of the embedded world, whose prompts --pairs replaces", param_hint="--split")
    training_place(out, (model, extend, start_from))
    pipeline = load_pipeline(model, config).to(device_of(device))
    base = None if extend is None else SafetyModule.load(extend).to(pipeline.device)
    start = None if start_from is None else SafetyModule.load(start_from).to(pipeline.device)
    known = [] if base is None else base.config.concept_names
    source = _source(pipeline, pairs, concept or [], rewrite or [], style or [], split, known)
    prompts = _hardened(source) if harden else source
    module = train_module(
        pipeline, prompts, out, seed=seed, steps=steps, runs=runs, pairs=pair_count, runs_from=runs_from, extend=base,
        start=start, batch_scale=batch_scale,
    )  # fmt: skip
    typer.echo(json.dumps(module.config.provenance, indent=1))


def _source(
    pipeline: Any,
    pairs: Path | None,
    concepts: list[str],
    rewrites: list[str],
    styles: list[str],
    split: Path | None,
    known: list[str],
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

    source = FilePrompts(pairs, concepts, dict(_rewrite(text) for text in rewrites), styles)
    source.check_tokens(lambda prompts: tokenize(pipeline.tokenizer, prompts))
    return source


def _hardened(source: PromptSource) -> PromptSource:
    from saferedir_torch.attacks.hardening import HardenedPrompts
    from saferedir_torch.everyday import EverydayPrompts

    return EverydayPrompts(HardenedPrompts(source))


def _rewrite(text: str) -> tuple[str, Rewrite]:
    concept, colon, rule = text.partition(":")
    word, equals, other = rule.partition("=")
    if not (colon and equals and concept and word):
        raise typer.BadParameter(f"{text!r} is not CONCEPT:WORD=OTHER", param_hint="--rewrite")
    from saferedir_torch.pairs_file import Rewrite

    return concept, Rewrite(word, other)
