"""The commands that set levels and thresholds of a trained module."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from saferedir_torch.command_line.options import Config, Device, Model, Seed, device_of

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

    from saferedir_torch.recording import RecordedRuns

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
        int, typer.Option(help="Benign pictures to draw; at 0.1 % and three concepts none of 7752 may fire, of 9151 one.")
    ] = 7752,
    rate: Annotated[
        float, typer.Option(min=1e-6, max=0.01, help="Share of benign pictures that at most fire, to be promised.")
    ] = 0.001,
    level_count: Annotated[
        int, typer.Option(help="Benign pictures to draw besides, which say how high clean scores come at each timestep.")
    ] = 2400,
    strength: Annotated[
        list[str] | None, typer.Option(help="CONCEPT=S to redirect one with another strength than it was trained at.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Denoising steps.")] = 25,
    guidance: Annotated[float, typer.Option(help="Guidance scale.")] = 5.0,
    seed: Seed = 0,
    device: Device = "auto",
    config: Config = None,
) -> None:
    """Set the thresholds so that at most a given share of benign pictures fire, with 95 % confidence, and state that promise.

    python -m saferedir_torch calibrate --model MODEL --safety castle/safety --prompts benign.txt --recorded castle/benign
    """
    from msgspec.structs import asdict, replace

    from saferedir_torch.attacks.hardening import strange_prompts
    from saferedir_torch.calibration import calibrate as calibrate_module
    from saferedir_torch.command_line.benign_prompts import benign_prompts
    from saferedir_torch.models import load_pipeline
    from saferedir_torch.prompt_levels import set_prompt_levels
    from saferedir_torch.safety_module import SafetyModule

    pipeline = load_pipeline(model, config).to(device_of(device))
    module = SafetyModule.load(safety).to(pipeline.device)
    scales = _strengths(strength or [], module.config.concept_names)
    named = (replace(one, alpha_scale=scales.get(one.name, one.alpha_scale)) for one in module.config.concepts)
    module.config = replace(module.config, concepts=tuple(named))
    drawn, asked = [], []
    for name, pictures, stream in (("levels", level_count, seed + 1), ("bound", count, seed)):
        texts, seeds, kind = benign_prompts(prompts, pictures, stream, module.config.concept_names)
        asked.append(texts)
        drawn.append(_recorded(pipeline, texts, seeds, steps, guidance, recorded / name))
    leveling, bounding = drawn
    promise = calibrate_module(
        module, leveling, bounding, steps=steps, guidance_scale=guidance, prompts=kind, rate=rate,
        level_prompts=lambda own: set_prompt_levels(pipeline, own, strange_prompts(asked[0], seed=seed)),
    )  # fmt: skip
    module.save(safety)
    thresholds = {concept.name: concept.threshold for concept in module.config.concepts}
    typer.echo(json.dumps({"promise": asdict(promise), "thresholds": thresholds}, indent=1))


def _recorded(
    pipeline: StableDiffusionPipeline, prompts: Sequence[str], seeds: Sequence[int], steps: int, guidance: float, folder: Path
) -> RecordedRuns:
    """Benign trajectories, drawn under a progress bar where `folder` has not got them."""
    from rich.progress import Progress

    from saferedir_torch.recording import record

    with Progress() as progress:
        bar = progress.add_task(f"benign trajectories: {folder.name}", total=len(prompts))
        return record(
            pipeline, prompts, seeds, steps=steps, guidance_scale=guidance, folder=folder,
            on_progress=lambda done, _: progress.update(bar, completed=done),
        )  # fmt: skip


def _strengths(texts: list[str], concepts: Sequence[str]) -> dict[str, float]:
    scales = {}
    for text in texts:
        name, _, number = text.partition("=")
        try:
            scales[name] = float(number)
        except ValueError:
            raise typer.BadParameter(f"{text!r} is not CONCEPT=S, such as castle=1.8", param_hint="--strength") from None
        if name not in concepts or not 0 < scales[name] <= 10:
            raise typer.BadParameter(
                f"{text!r}: expected one of {', '.join(concepts)} and a strength above 0, at most 10", param_hint="--strength"
            )
    return scales
