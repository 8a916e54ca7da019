"""The command that attacks whatever keeps a model from drawing a concept."""

from __future__ import annotations

import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from PIL import Image
from rich.console import Console
from rich.table import Table

from saferedir.engines.errors import RequestError
from saferedir.engines.printable import printable
from saferedir.engines.text_files import read_text
from saferedir_torch.attacks.amplified_guidance import AMPLIFIED_GUIDANCE, AmplifiedGuidance, Pair
from saferedir_torch.attacks.diffusers_model import DiffusersModel
from saferedir_torch.attacks.suite import AT_LEAST, SEEDS_A_PROMPT, UNCHANGED, Bools, Pixels, Shows, attack, attempts
from saferedir_torch.attacks.techniques import drawing_with, load_technique
from saferedir_torch.attacks.text_families import FAMILIES, Target
from saferedir_torch.evaluation.measures import FOUND
from saferedir_torch.trajectories import encode
from saferedir_torch.world.judge import Judge

app = typer.Typer(pretty_exceptions_enable=False)
ALL_FAMILIES = (*FAMILIES, AMPLIFIED_GUIDANCE)


@app.command()
def main(
    model: Annotated[str, typer.Option(help="Folder or hub name of the model without any safety.")],
    technique: Annotated[str, typer.Option(help="An installed technique of eval-unlearn, such as saferedir, or module:Class.")],
    targets: Annotated[
        Path,
        typer.Option(
            help='JSON list of {"prompt": "a castle at dusk", "words": "a castle"}; for '
            f'{AMPLIFIED_GUIDANCE} also "safe": "a house at dusk" in each.'
        ),
    ],
    judge: Annotated[str, typer.Option(help="Folder of a judge network, or module:function, pictures in, true or false out.")],
    out: Annotated[Path, typer.Option(help="JSON file for the results.")],
    shows: Annotated[list[str] | None, typer.Option(help="What a judge network looks for, again for more.")] = None,
    found_at: Annotated[float, typer.Option(help="Probability from which a judge network finds it.")] = FOUND,
    option: Annotated[list[str] | None, typer.Option(help="NAME=VALUE for the technique, again for more.")] = None,
    family: Annotated[
        list[str] | None, typer.Option(help=f"One of {', '.join(ALL_FAMILIES)}; all but the last by default.")
    ] = None,
    seeds: Annotated[int, typer.Option(help="Pictures of each prompt.")] = SEEDS_A_PROMPT,
    at_least: Annotated[int, typer.Option(help="Pictures that must show the concept without safety, a family.")] = AT_LEAST,
    seed: Annotated[int, typer.Option(help="Seed of the rewriting, and first seed of the pictures.")] = 0,
) -> None:
    """Rewrite prompts that ask for a concept in ways that hide it, and count how often it is drawn all the same.

    The embedded model and its safety:

      saferedir attack --model saferedir_torch/shipped/emoji-diffusion --technique saferedir
      --targets targets.json --judge benchmarks/networks/judge --shows church --out attacks.json

    Your own:

      saferedir attack --model stable-diffusion-v1-5/stable-diffusion-v1-5 --technique mine.safety:Erased
      --option strength=2 --targets targets.json --judge mine.judges:finds_a_castle --out attacks.json
    """
    chosen = family or list(FAMILIES)
    if unknown := sorted(set(chosen) - set(ALL_FAMILIES)):
        raise typer.BadParameter(f"unknown {', '.join(unknown)}; expected {', '.join(ALL_FAMILIES)}", param_hint="--family")
    try:
        asked, looks = read_targets(targets), load_judge(judge, shows or [], found_at)
        pairs = read_pairs(targets) if AMPLIFIED_GUIDANCE in chosen else []
        plain, safe = DiffusersModel(model), load_technique(technique, _options(option or []))
        figures = {}
        for name in (UNCHANGED, *chosen):
            if name == AMPLIFIED_GUIDANCE:
                own = AmplifiedGuidance(lambda prompts: encode(plain.pipeline, list(prompts))[1])
                made = own.attempts(pairs, seed, seeds_a_prompt=seeds, seed=seed)
                unprotected, protected = own.drawing(plain), own.drawing(safe)
            else:
                made = attempts(asked, name, seed, seeds_a_prompt=seeds, seed=seed)
                unprotected, protected = drawing_with(plain), drawing_with(safe)
            figures[name] = attack(made, unprotected, protected, looks, at_least=at_least).figures()
            _write(out, {"model": model, "technique": technique, "seed": seed, "families": figures})
    except (ValueError, OSError) as error:
        typer.echo(f"error: {printable(error)}", err=True)
        raise typer.Exit(2) from error
    _show(figures)


def read_targets(path: Path) -> list[Target]:
    """The prompts to attack, from a JSON list.

    Raises:
        RequestError: the file is not of that form; the message names it and the entry.
    """
    found = []
    for number, entry in enumerate(_entries(path)):
        match entry:
            case {"prompt": str(prompt), "words": str(words)}:
                try:
                    found.append(Target(prompt, words))
                except ValueError as error:
                    raise RequestError(f"{path}, entry {number}: {error}") from error
            case _:
                raise RequestError(f'{path}, entry {number}: expected {{"prompt": ..., "words": ...}}, found {entry!r}')
    return found


def read_pairs(path: Path) -> list[Pair]:
    """The same with the safe prompts of amplified guidance.

    Raises:
        RequestError: the file is not of that form; the message names it and the entry.
    """
    found = []
    for number, (target, entry) in enumerate(zip(read_targets(path), _entries(path), strict=True)):
        safe = entry.get("safe")
        if not isinstance(safe, str) or not safe.strip():
            raise RequestError(f'{path}, entry {number}: expected "safe": ..., which {AMPLIFIED_GUIDANCE} starts from')
        found.append(Pair(target.prompt, safe, target.words))
    return found


def _entries(path: Path) -> list[Any]:
    try:
        entries = json.loads(read_text(path))
    except (RequestError, ValueError, RecursionError) as error:
        raise RequestError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(entries, list) or not entries:
        raise RequestError(f'{path} holds no list; expected [{{"prompt": ..., "words": ...}}, ...]')
    return entries


def load_judge(judge: str, keys: Sequence[str], found_at: float) -> Shows:
    """A function `module:function` of a list of PIL pictures, or the judge network in a folder, looking for `keys`.

    Raises:
        RequestError: there is no such function or folder, or the network knows no such key.
    """
    module, colon, name = judge.partition(":")
    if colon:
        try:
            function = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError) as error:
            raise RequestError(f"judge {judge!r} cannot be imported: {error}") from error
        return lambda pixels: np.asarray(function([Image.fromarray(picture) for picture in pixels]), np.bool_)
    if not Path(judge).is_dir():
        raise RequestError(f"judge {judge!r} is no folder; expected that of a judge network, or module:function")
    network = Judge.load(Path(judge))
    if not keys:
        raise RequestError("a judge network needs --shows: the objects or styles, any of which is the concept")

    def shows(pixels: Pixels) -> Bools:
        pictures = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
        return np.asarray((network.judge(pictures).of(keys) >= found_at).numpy(), np.bool_)

    return shows


def _options(given: Sequence[str]) -> dict[str, Any]:
    """NAME=VALUE, the value as JSON where it is."""
    options: dict[str, Any] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise RequestError(f"--option {text!r} is not of the form NAME=VALUE")
        try:
            options[name] = json.loads(value)
        except json.JSONDecodeError:
            options[name] = value
    return options


def _write(path: Path, results: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(results, indent=1))
    partial.replace(path)


def _show(figures: dict[str, Any]) -> None:
    table = Table("family", "shows it without safety", "ASR", "best seed", box=None)
    for name, row in figures.items():
        of = f"{row['counted']} of {row['pictures']}"
        if row["is_attack"]:
            table.add_row(name, of, *(f"{100 * row[key]['share']:.1f} %" for key in ("asr", "asr_best_of_seeds")))
        else:
            table.add_row(name, of, "no attack here", "")
    Console().print(table)
