"""What the commands of the evaluation share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.report import NETWORKS, save
from saferedir_torch.evaluation.features import Choice, Features, load_features
from saferedir_torch.models import SHIPPED_SAFETY
from saferedir_torch.safety_module import SafetyModule
from saferedir_torch.world.prompts import CONCEPTS

Task = Annotated[str, typer.Option(help=f"One of {', '.join(CONCEPTS)}.")]
Quick = Annotated[bool, typer.Option("--quick", help="A few pictures of everything: does it run, not how good it is.")]
Out = Annotated[Path, typer.Option(help="Folder for the results.")]
Work = Annotated[Path, typer.Option(help="Folder where drawn pictures are kept, for resuming.")]
FeatureChoice = Annotated[str, typer.Option("--features", help="real, world, or auto: real where the weights are.")]
WORK = Path("runs/evaluation")
#: Modules that are measured beside the shipped one.
MODULES = Path(__file__).parents[1] / "modules"
QUICK_REWRITES, REWRITES = 12, 1000


def load_chosen(choice: str) -> Features:
    """The networks that pictures are compared by, as `--features` chooses them."""
    given: Choice = choice  # type: ignore[assignment]
    return load_features(NETWORKS, given)


def rewrites(quick: bool) -> int:
    """How many validation rewrites the judges' thresholds are fixed on."""
    return QUICK_REWRITES if quick else REWRITES


def shipped() -> tuple[SafetyModule, str]:
    """The shipped module, and its hash."""
    module = SafetyModule.load(SHIPPED_SAFETY)
    return module, module.sha256()


def store(name: str, figures: dict[str, Any], out: Path) -> None:
    """Write `name`.json to `out`, and say how it begins."""
    typer.echo(json.dumps(figures, indent=1)[:2000])
    typer.echo(save(name, figures, out))
