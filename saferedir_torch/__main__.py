"""Safety training and its oracle ladder: `python -m saferedir_torch --help`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Train and examine safety modules.", no_args_is_help=True, pretty_exceptions_enable=False)
Model = Annotated[Path, typer.Option(help="Folder or hub name of a Stable Diffusion 1.x pipeline.")]
SplitFile = Annotated[Path | None, typer.Option(help="Which names, pairs and seeds may be seen; the shipped one by default.")]
Seed = Annotated[int, typer.Option(help="Seed of everything random.")]


@app.command()
def train(
    model: Model,
    out: Annotated[Path, typer.Option(help="Folder for checkpoints, logs, recorded runs and the module itself.")],
    split: SplitFile = None,
    concept: Annotated[list[str], typer.Option(help="Concept to forget; may be given several times.")] = ["church"],  # noqa: B006
    seed: Seed = 0,
    steps: Annotated[int, typer.Option(help="Optimisation steps.")] = 1500,
    runs: Annotated[int, typer.Option(help="Unsafe runs to record, a concept.")] = 400,
    pairs: Annotated[int, typer.Option(help="Prompt pairs, a concept.")] = 5000,
) -> None:
    """Train a safety module: `python -m saferedir_torch train --model runs/world/emoji-diffusion --out runs/church`."""
    from saferedir_torch.models import load_pipeline
    from saferedir_torch.train import train as train_module
    from saferedir_torch.world.split import SPLIT_FILE, load_split

    module = train_module(
        load_pipeline(model),
        load_split(split or SPLIT_FILE),
        out,
        concepts=concept,
        seed=seed,
        steps=steps,
        runs=runs,
        pairs=pairs,
    )
    typer.echo(json.dumps(module.config.provenance, indent=1))


@app.command()
def oracle(
    model: Model,
    judge: Annotated[Path, typer.Option(help="Folder of the judge.")],
    out: Annotated[Path, typer.Option(help="JSON file for the table.")],
    safety: Annotated[Path | None, typer.Option(help="Folder of a trained module, for the last rung.")] = None,
    concept: Annotated[str, typer.Option(help="Concept to forget.")] = "church",
    count: Annotated[int, typer.Option(help="Pictures a rung.")] = 120,
    split: SplitFile = None,
    seed: Seed = 0,
) -> None:
    """Draw the oracle ladder: how well exact redirections forget, rung by rung."""
    from saferedir_torch.models import load_pipeline
    from saferedir_torch.oracle import oracle_ladder
    from saferedir_torch.safety_module import SafetyModule
    from saferedir_torch.world.judge import Judge
    from saferedir_torch.world.prompts import CONCEPTS
    from saferedir_torch.world.split import SPLIT_FILE, load_split

    module = None if safety is None else SafetyModule.load(safety)
    rows = oracle_ladder(
        load_pipeline(model), Judge.load(judge), CONCEPTS[concept], load_split(split or SPLIT_FILE),
        safety=module, count=count, seed=seed, say=typer.echo,
    )  # fmt: skip
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"concept": concept, "count": count, "seed": seed, "rows": rows}, indent=1) + "\n")


def main() -> None:
    """Run a command; what a user can cause ends in one line and exit code 2."""
    from saferedir_torch.config import SafetyConfigError
    from saferedir_torch.training_run import TrainingError
    from saferedir_torch.world.split import SplitError

    try:
        app()
    except (TrainingError, SplitError, SafetyConfigError, FileNotFoundError) as error:
        typer.echo(f"error: {error}", err=True)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
