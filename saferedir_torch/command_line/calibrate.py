"""The commands that set levels and thresholds of a trained module."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from saferedir_torch.command_line.options import Config, Device, Model, Seed, device_of

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from saferedir.engines.manifest import Envelope

app = typer.Typer()


@app.command()
def calibrate(
    model: Model,
    safety: Annotated[Path, typer.Option(help="Folder of the trained module; its thresholds are replaced.")],
    recorded: Annotated[Path, typer.Option(help="Folder that the benign trajectories are kept in, for resuming and reuse.")],
    prompts: Annotated[
        Path | None, typer.Option(help="Text file with a benign prompt a line; without it those of the embedded world.")
    ] = None,
    count: Annotated[
        int, typer.Option(help="Benign pictures to draw; at 0.1 % none of 2995 may fire, of 4742 one, of 6294 two.")
    ] = 6294,
    rate: Annotated[
        float, typer.Option(min=1e-6, max=0.01, help="Share of benign pictures that at most fire, to be promised.")
    ] = 0.001,
    centre_count: Annotated[
        int, typer.Option(help="Benign pictures to draw besides, which say how high clean scores come at each noise level.")
    ] = 2400,
    steps: Annotated[str, typer.Option(metavar="FEWEST-MOST", help="Numbers of steps that the promise is for.")] = "4-50",
    guidance: Annotated[str, typer.Option(metavar="LEAST-MOST", help="Guidance scales that it is for; 1 is none.")] = "1-12",
    sampler: Annotated[
        list[str] | None, typer.Option(help="Sampler that it is for, again for more; all but lcm by default.")
    ] = None,
    seed: Seed = 0,
    device: Device = "auto",
    config: Config = None,
) -> None:
    """Set the thresholds so that at most a given share of benign pictures fire, with 95 % confidence, and state that promise,
    with the settings it is for: pictures are drawn across them.

    saferedir calibrate --model MODEL --safety castle/safety --prompts benign.txt --recorded castle/benign
    """
    from msgspec import to_builtins
    from rich.progress import Progress

    from saferedir_torch.calibration import calibrate as calibrate_module
    from saferedir_torch.command_line.benign_prompts import benign_prompts
    from saferedir_torch.envelope import ENVELOPE
    from saferedir_torch.models import load_pipeline
    from saferedir_torch.runs import benign_runs
    from saferedir_torch.safety_module import SafetyModule

    envelope = _envelope(steps, sampler or ENVELOPE.samplers, guidance)
    pipeline = load_pipeline(model, config).to(device_of(device))
    module = SafetyModule.load(safety).to(pipeline.device)
    drawn = []
    with Progress() as progress:
        for name, pictures, stream in (("centre", centre_count, seed + 1), ("bound", count, seed)):
            texts, seeds, kind = benign_prompts(prompts, pictures, stream, module.config.concept_names)
            bar = progress.add_task(f"benign pictures: {name}", total=len(texts))
            drawn.append(benign_runs(
                pipeline, texts, seeds, recorded / name, seed=stream, envelope=envelope,
                on_progress=partial(_advance, progress, bar),
            ))  # fmt: skip
    promise = calibrate_module(module, *drawn, envelope=envelope, prompts=kind, rate=rate)
    module.save(safety)
    thresholds = {concept.name: concept.threshold for concept in module.config.concepts}
    typer.echo(json.dumps({"promise": to_builtins(promise), "thresholds": thresholds}, indent=1))


def _advance(progress: Progress, bar: TaskID, done: int, total: int) -> None:
    progress.update(bar, completed=done, total=total)


def _envelope(steps: str, samplers: Sequence[str], guidance: str) -> Envelope:
    from msgspec import ValidationError, convert

    from saferedir.engines.manifest import Envelope
    from saferedir_torch.trajectories import SAMPLERS

    if unknown := [name for name in samplers if name not in SAMPLERS]:
        expected = ", ".join(SAMPLERS)
        raise typer.BadParameter(f"{', '.join(unknown)} is not known; expected some of {expected}", param_hint="--sampler")
    asked = {"steps": _range(steps, "--steps", int), "guidance_scale": _range(guidance, "--guidance", float)}
    try:
        return convert(asked | {"samplers": tuple(samplers)}, Envelope)
    except ValidationError as error:
        raise typer.BadParameter(str(error), param_hint="--steps, --guidance") from None


def _range(text: str, option: str, kind: Callable[[str], float]) -> tuple[float, float]:
    low, dash, high = text.partition("-")
    try:
        return kind(low), kind(high if dash else low)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is no range, such as 4-50", param_hint=option) from None
