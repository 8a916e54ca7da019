"""What the commands of safety training share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

Model = Annotated[Path, typer.Option(help="Folder or hub name of a Stable Diffusion pipeline, or one .safetensors file.")]
Config = Annotated[str | None, typer.Option(help="Folder or hub name with the configuration of a single file.")]
Seed = Annotated[int, typer.Option(help="Seed of everything random.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, or auto: the GPU where there is one.")]


def device_of(name: str) -> Any:
    """The device that `--device` names.

    Raises:
        typer.BadParameter: there is none of that name here.
    """
    from saferedir_torch.models import device_called

    try:
        return device_called(name)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--device") from None
