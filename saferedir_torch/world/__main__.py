"""Builds the embedded world, one command a stage: `python -m saferedir_torch.world STAGE`, in the order of --help."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="Build emoji-diffusion. Stages in order: icons, split, tokenizer, vae, clip, latents, base, judge, quality.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
Folder = Annotated[Path, typer.Option(help="Where checkpoints, logs, samples and results go.")]
Seed = Annotated[int, typer.Option(help="Seed of everything random in this stage.")]
Steps = Annotated[int | None, typer.Option(help="Optimisation steps; the default is what the shipped weights took.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, or auto: the GPU where there is one.")]
DEFAULT_FOLDER = Path("runs/world")


@app.command()
def icons() -> None:
    """Fetch the icon packs with npm and rasterise them into the sprite atlases (checked in already)."""
    from saferedir_torch.world.icons import build_atlases

    build_atlases()


@app.command()
def split(seed: Seed = 0) -> None:
    """Draw which names, pairs and seeds safety training may see (checked in already)."""
    from saferedir_torch.world.split import SPLIT_FILE, draw_split, save_split

    save_split(draw_split(seed))
    typer.echo(SPLIT_FILE)


@app.command()
def tokenizer(folder: Folder = DEFAULT_FOLDER, seed: Seed = 0) -> None:
    """Train the byte-level BPE tokenizer. Seconds."""
    from saferedir_torch.world.tokenizer import train_tokenizer

    typer.echo(train_tokenizer(folder, seed=seed))


@app.command()
def vae(folder: Folder = DEFAULT_FOLDER, seed: Seed = 0, steps: Steps = None, device: Device = "auto") -> None:
    """Train the autoencoder. About 13 minutes on two cores."""
    from saferedir_torch.world.vae import VAE_STEPS, train_vae

    typer.echo(train_vae(folder, seed=seed, steps=steps or VAE_STEPS, device=_device(device)))


@app.command()
def clip(folder: Folder = DEFAULT_FOLDER, seed: Seed = 0, steps: Steps = None) -> None:
    """Pre-train the text encoder against an image tower. About 4 minutes on two cores."""
    from saferedir_torch.world.clip import train_clip

    typer.echo(train_clip(folder, seed=seed, **_given(steps)))


@app.command()
def latents(
    folder: Folder = DEFAULT_FOLDER,
    seed: Seed = 0,
    count: Annotated[int, typer.Option(min=1, help="Pictures; 16000 are enough for a model that is trained on.")] = 48_000,
) -> None:
    """Draw the training pictures and encode them with the autoencoder. About 15 minutes on two cores."""
    from saferedir_torch.world.base import encode_bank

    typer.echo(encode_bank(folder, seed=seed, size=count))


@app.command()
def base(
    folder: Folder = DEFAULT_FOLDER,
    seed: Seed = 0,
    steps: Steps = None,
    start_from: Annotated[Path | None, typer.Option(help="Folder of an earlier model that is trained on.")] = None,
) -> None:
    """Train UNet and text encoder, save the Stable Diffusion folder. About 52 minutes on two cores that have bf16.

    Example, of an earlier model with another vocabulary: `python -m saferedir_torch.world base --start-from MODEL --steps 1600`
    """
    from saferedir_torch.world.base import train_base

    typer.echo(train_base(folder, seed=seed, start=start_from, **_given(steps)))


@app.command()
def judge(folder: Folder = DEFAULT_FOLDER, seed: Seed = 0, steps: Steps = None) -> None:
    """Train the judge and report its accuracy on held-out renderings. About 25 minutes on two cores."""
    from saferedir_torch.world.judge import Judge, judge_accuracy, train_judge

    out = train_judge(folder, seed=seed, steps=steps)
    typer.echo(json.dumps(judge_accuracy(Judge.load(out)), indent=1))


@app.command(name="second-judge")
def second_judge(
    folder: Folder = DEFAULT_FOLDER,
    seed: Seed = 0,
    steps: Steps = None,
    pictures: Annotated[str | None, typer.Option(help="Kind of a fine-tuned model whose pictures are to be judged.")] = None,
    start_from: Annotated[Path | None, typer.Option(help="Folder of a second judge that training begins with.")] = None,
) -> None:
    """Train the second judge, of another architecture and on other renderings, and report its accuracy.

    Example, one for a model with changed pictures, in which the shipped judges find little: `python -m saferedir_torch.world
    second-judge --pictures changed-pictures --start-from benchmarks/networks/second_judge --steps 1200 --folder runs/changed`
    """
    from saferedir_torch.world.fine_tuning import KINDS
    from saferedir_torch.world.judge import JUDGE_FILE, Judge, judge_accuracy, train_judge
    from saferedir_torch.world.scenes import draw

    if pictures is not None and pictures not in KINDS:
        raise typer.BadParameter(f"{pictures!r} is none of {', '.join(KINDS)}", param_hint="--pictures")
    if start_from is not None and not (start_from / JUDGE_FILE).is_file():
        raise typer.BadParameter(f"{start_from} holds no {JUDGE_FILE}", param_hint="--start-from")
    if start_from is not None and Judge.load(start_from).architecture != "residual":
        raise typer.BadParameter(f"{start_from} holds the first judge; expected a second one", param_hint="--start-from")
    paint = draw if pictures is None else KINDS[pictures]
    out = train_judge(folder, seed=seed, steps=steps, architecture="residual", paint=paint, start=start_from)
    typer.echo(json.dumps(judge_accuracy(Judge.load(out), paint=paint), indent=1))


@app.command(name="clip-world")
def clip_world(folder: Folder = DEFAULT_FOLDER, seed: Seed = 0, steps: Steps = None) -> None:
    """Train the image-text score of this world, on the shipped model's tokenizer."""
    from saferedir_torch.models import load_pipeline
    from saferedir_torch.world.clip_world import train_clip_world

    typer.echo(train_clip_world(folder, load_pipeline().tokenizer, seed=seed, **_given(steps)))


@app.command()
def quality(
    folder: Folder = DEFAULT_FOLDER,
    seed: Seed = 0,
    guidance: Annotated[float, typer.Option(help="Guidance scale.")] = 5.0,
    per_name: Annotated[int, typer.Option(help="Pictures a name.")] = 2,
    out: Annotated[Path | None, typer.Option(help="JSON file for the figures; a contact sheet lies beside it.")] = None,
) -> None:
    """Measure the base model by the judge: single objects by every name, pairs, styles."""
    from saferedir_torch.models import load_pipeline
    from saferedir_torch.world.judge import Judge, judge_accuracy
    from saferedir_torch.world.quality import base_quality

    judge = Judge.load(folder / "judge")
    sheet = None if out is None else out.with_suffix(".png")
    pipeline = load_pipeline(folder / "emoji-diffusion")
    report = base_quality(
        pipeline,
        judge,
        seed=seed,
        guidance_scale=guidance,
        per_name=per_name,
        sheet=sheet,
        say=lambda line: typer.echo(line, err=True),
    )
    text = json.dumps({"judge": judge_accuracy(judge), "base": report}, indent=1)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text + "\n")
    typer.echo(text)


@app.command(name="fine-tune")
def fine_tune(
    kind: Annotated[str, typer.Option(help="one-style, changed-pictures, or few-step for one that draws in four steps.")],
    folder: Folder,
    seed: Seed = 0,
    steps: Steps = None,
    device: Device = "auto",
) -> None:
    """Make another model of the shipped one, to try its safety on unchanged."""
    from saferedir_torch.world import fine_tuning

    where = _device(device)
    if kind == "few-step":
        typer.echo(fine_tuning.distil(folder, seed=seed, steps=steps or fine_tuning.DISTIL_STEPS, device=where))
    elif kind in fine_tuning.KINDS:
        typer.echo(fine_tuning.fine_tune(kind, folder, seed=seed, steps=steps or fine_tuning.TUNE_STEPS, device=where))
    else:
        raise typer.BadParameter(f"{kind!r} is none of {', '.join((*fine_tuning.KINDS, 'few-step'))}", param_hint="--kind")


@app.command()
def architecture(
    kind: Annotated[str, typer.Option(help="other-vae, wider-text (which predicts velocity) or transformer.")],
    folder: Folder,
    seed: Seed = 0,
    steps: Steps = None,
    device: Device = "auto",
) -> None:
    """Make a model of the same world with another autoencoder, text encoder or backbone, to re-fit the safety to."""
    from saferedir_torch.world.architectures import ARCHITECTURES, make

    if kind not in ARCHITECTURES:
        raise typer.BadParameter(f"{kind!r} is none of {', '.join(ARCHITECTURES)}", param_hint="--kind")
    typer.echo(make(kind, folder, seed=seed, steps=steps, device=_device(device)))


@app.command()
def oracle(
    model: Annotated[Path, typer.Option(help="Folder of the model.")],
    judge: Annotated[Path, typer.Option(help="Folder of the judge.")],
    out: Annotated[Path, typer.Option(help="JSON file for the table.")],
    safety: Annotated[Path | None, typer.Option(help="Folder of a trained module, for the last rung.")] = None,
    concept: Annotated[str, typer.Option(help="Concept to forget.")] = "church",
    count: Annotated[int, typer.Option(help="Pictures a rung.")] = 120,
    split: Annotated[Path | None, typer.Option(help="Which names, pairs and seeds may be seen; the shipped one.")] = None,
    seed: Seed = 0,
    device: Device = "auto",
) -> None:
    """Draw the oracle ladder: how well exact redirections forget, rung by rung."""
    from saferedir_torch.models import load_pipeline
    from saferedir_torch.safety_module import SafetyModule
    from saferedir_torch.world.judge import Judge
    from saferedir_torch.world.oracle import oracle_ladder
    from saferedir_torch.world.prompts import CONCEPTS
    from saferedir_torch.world.split import SPLIT_FILE, load_split

    pipeline = load_pipeline(model).to(_device(device))
    module = None if safety is None else SafetyModule.load(safety).to(pipeline.device)
    rows = oracle_ladder(
        pipeline, Judge.load(judge), CONCEPTS[concept], load_split(split or SPLIT_FILE),
        safety=module, count=count, seed=seed, say=typer.echo,
    )  # fmt: skip
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"concept": concept, "count": count, "seed": seed, "rows": rows}, indent=1) + "\n")


def _device(name: str) -> str:
    from saferedir_torch.models import device_called

    try:
        return str(device_called(name))
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--device") from None


def _given(steps: int | None) -> dict[str, int]:
    return {} if steps is None else {"steps": steps}


if __name__ == "__main__":
    app()
