"""A branch that was added to the shipped module, kept without the module that it stands on.

`python -m benchmarks.added_branch runs/teddy/safety` keeps that of a trained module in `benchmarks/modules`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from safetensors.torch import load_file, save_file

from saferedir.engines.errors import RequestError
from saferedir_torch.config import SafetyConfig
from saferedir_torch.models import SHIPPED_SAFETY
from saferedir_torch.safety_module import CONFIG_FILE, WEIGHTS_FILE, SafetyModule

MODULES = Path(__file__).with_name("modules")


def save_branch(base: SafetyModule, extended: SafetyModule, folder: Path) -> None:
    """Write the last branch of `extended` to `folder`, with the configuration of the whole.

    Raises:
        RequestError: `extended` is not `base` with one branch more.
    """
    new = _prefix(base)
    tensors = {name: tensor.half().contiguous() for name, tensor in extended.state_dict().items() if name.startswith(new)}
    rest = {name: tensor for name, tensor in extended.state_dict().items() if not name.startswith(new)}
    own = base.state_dict()
    if not tensors or rest.keys() != own.keys() or any(not torch.equal(rest[name], own[name]) for name in own):
        raise RequestError("the module is not the shipped one with a branch more; train it with --extend")
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    extended.config.save(folder / CONFIG_FILE)


def load_with_branch(base: SafetyModule, folder: Path) -> SafetyModule:
    """`base` with the branch in `folder`, in evaluation mode."""
    extended = SafetyModule(SafetyConfig.load(folder / CONFIG_FILE))
    branch = {name: tensor.float() for name, tensor in load_file(folder / WEIGHTS_FILE).items()}
    extended.load_state_dict({**base.state_dict(), **branch})
    return extended.eval()


def _prefix(base: SafetyModule) -> str:
    return f"branches.{len(base.branches)}."


def main(safety: Annotated[Path, typer.Argument(help="Folder of a module trained with --extend.")]) -> None:
    """Keep the branch that was added last in `benchmarks/modules`, under its concept's name."""
    extended = SafetyModule.load(safety)
    folder = MODULES / extended.config.concept_names[-1]
    save_branch(SafetyModule.load(SHIPPED_SAFETY), extended, folder)
    typer.echo(folder)


if __name__ == "__main__":
    typer.run(main)
