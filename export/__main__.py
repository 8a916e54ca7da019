"""Exports a bundle: `python -m saferedir.export --out FOLDER`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from saferedir_torch.models import SHIPPED_MODEL, SHIPPED_SAFETY


def main(
    out: Annotated[Path, typer.Option(help="Folder of the bundle; replaced as a whole when all engines are done.")],
    model: Annotated[Path, typer.Option(help="Stable Diffusion 1.x folder.")] = SHIPPED_MODEL,
    safety: Annotated[Path, typer.Option(help="Safety module folder.")] = SHIPPED_SAFETY,
    name: Annotated[str, typer.Option(help="What the bundle calls itself.")] = "emoji-diffusion",
    max_batch: Annotated[int, typer.Option(min=1, max=31, help="Largest batch the runtime will run at once.")] = 16,
) -> None:
    """Export every engine to ONNX, with fp16 weights and fp32 arithmetic."""
    from saferedir.export.bundle_export import export_bundle
    from saferedir_torch.models import load_pipeline
    from saferedir_torch.safety_module import SafetyModule

    folder = export_bundle(
        load_pipeline(model), SafetyModule.load(safety), out, name=name, max_batch=max_batch,
        on_engine=lambda engine: typer.echo(f"exporting {engine}", err=True),
    )  # fmt: skip
    size = sum(path.stat().st_size for path in folder.iterdir())
    typer.echo(f"{folder}: {size / 1e6:.1f} MB")


typer.run(main)
