"""What the commands of the evaluation share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.report import NETWORKS, save
from saferedir_torch.evaluation.features import Features
from saferedir_torch.models import SHIPPED_SAFETY
from saferedir_torch.safety_module import SafetyModule
from saferedir_torch.world.features import Choice, load_features
from saferedir_torch.world.prompts import CONCEPTS


def known_tasks(given: Any) -> Any:
    """One task or several, as they were given.

    Raises:
        typer.BadParameter: one of them is no concept of this world.
    """
    for task in [given] if isinstance(given, str) else given or []:
        if task not in CONCEPTS:
            raise typer.BadParameter(f"{task!r} is none of {', '.join(CONCEPTS)}")
    return given


Task = Annotated[str, typer.Option(help=f"One of {', '.join(CONCEPTS)}.", callback=known_tasks)]
Tasks = Annotated[
    list[str] | None, typer.Option("--task", help=f"Only this of {', '.join(CONCEPTS)}, again for more.", callback=known_tasks)
]
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
