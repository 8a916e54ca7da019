"""The command that says what a bundle's safety does to prompts of your own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from saferedir.engines import DEFAULT_BUNDLE
from saferedir.runtime.command_line.console import DigestOption, JsonOption, ThreadsOption, console, print_json, progress


def evaluate(
    bundle: Annotated[str, typer.Argument(help="Bundle folder, or an embedded one's name.")] = DEFAULT_BUNDLE,
    unsafe: Annotated[Path | None, typer.Option(help="A file with a prompt a line, which asks for what is forbidden.")] = None,
    benign: Annotated[Path | None, typer.Option(help="A file with a prompt a line, none of which does.")] = None,
    judge: Annotated[
        str | None, typer.Option(help="module:function, pictures in, a list of true or false out: whether it is drawn.")
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for figures, page and contact sheet.")] = Path("evaluation"),
    count: Annotated[int, typer.Option(min=1, help="Pictures a prompt.")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the first picture, the next ones count up.")] = 0,
    steps: Annotated[int, typer.Option(help="Denoising steps.")] = 25,
    guidance: Annotated[float, typer.Option(help="Guidance scale.")] = 5.0,
    scheduler: Annotated[str | None, typer.Option(help="Sampler; the bundle's own by default.")] = None,
    backend: Annotated[str, typer.Option(help="auto, or one that `doctor` lists.")] = "auto",
    threads: ThreadsOption = None,
    digest: DigestOption = None,
    as_json: JsonOption = False,
) -> None:
    """Draw prompts without and with safety: how often it fires, what a judge still finds, what stays to the bit, what it costs.

    Take prompts that neither training nor calibration has seen.

    Examples:

    `saferedir evaluate bundle --unsafe held_out.txt --benign everyday.txt --out report`

    `saferedir evaluate bundle --unsafe held_out.txt --judge mine.judges:finds_a_castle --steps 12 --scheduler euler`
    """
    from saferedir.engines.text_files import read_prompts
    from saferedir.runtime.evaluation import Asked, load_judge
    from saferedir.runtime.evaluation import evaluate as measure
    from saferedir.runtime.pipeline import Pipeline

    asks, harmless = (read_prompts(file) if file else [] for file in (unsafe, benign))
    looks = load_judge(judge) if judge else None
    pipeline = Pipeline.from_bundle(bundle, backend=backend, threads=threads, digest=digest)
    asked = Asked(asks, harmless, count=count, seed=seed, steps=steps, guidance=guidance, scheduler=scheduler)
    with progress("drawing") as on_step:
        found = measure(pipeline, asked, out, looks, on_step=on_step)
    if as_json:
        print_json(found)
        return
    table = Table("", "unsafe", "benign", box=None)
    for key, title in ROWS.items():
        table.add_row(title, *(_said(found.get(kind, {}).get(key)) for kind in ("unsafe", "benign")))
    console.print(table)
    console.print(f"{out / 'index.html'}")


ROWS = {
    "pictures": "pictures",
    "fired": "fired",
    "shown_without_safety": "the judge finds it without safety",
    "gone_with_it": "of these, gone under safety",
    "bit_identical_where_nothing_fired": "equal to the bit where nothing fired",
    "seconds_a_picture": "seconds a picture, without and with safety",
}


def _said(value: Any) -> str:
    match value:
        case None:
            return ""
        case {"share": None}:
            return "none to count"
        case {"hits": hits, "of": of, "low": low, "high": high}:
            return f"{hits} of {of} ({100 * low:.1f} to {100 * high:.1f} %)"
        case {"unprotected": before, "protected": after}:
            return f"{before:.2f}, {after:.2f}"
        case _:
            return str(value)
