"""Short runs: what learns to see a picture before it is there needs many pictures rather than many steps of each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from diffusers import StableDiffusionPipeline

from saferedir_torch.prompt_source import PromptSource
from saferedir_torch.training_data import LatentBank, cached_runs, load_runs, record_runs

#: Numbers of steps and guidance scales that they are drawn with.
SHORT_SAMPLINGS = ((10, 5.0), (10, 3.0))
#: Unsafe runs a concept in one file, so that a recording which was stopped goes on with the next.
PART = 500
#: Keeps random numbers apart from those of the long runs; each file counts up from here.
SEED_OFFSET = 100


def short_runs(
    pipeline: StableDiffusionPipeline,
    source: PromptSource,
    folder: Path,
    *,
    count: int,
    seed: int,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[LatentBank]:
    """`count` unsafe runs a concept and five others for each, as `record_runs` has them, in parts that are kept in `folder`."""
    parts = []
    for number, start in enumerate(range(0, count, PART)):

        def record(number: int = number, size: int = min(PART, count - start)) -> LatentBank:
            return record_runs(
                pipeline, source, count=size, seed=seed + SEED_OFFSET + number, samplings=SHORT_SAMPLINGS,
                on_progress=on_progress,
            )  # fmt: skip

        parts.append(cached_runs(_part(folder, number), record))
    return parts


def recorded_short_runs(folder: Path) -> list[LatentBank]:
    """What another training recorded in `folder`; nothing where it did without."""
    return [load_runs(path) for path in sorted(folder.glob("short_runs_*.safetensors"))]


def _part(folder: Path, number: int) -> Path:
    return folder / f"short_runs_{number:02d}.safetensors"
