"""Where a folder may be put as a whole: nothing that this product did not write is ever removed or overwritten."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

from saferedir.engines.errors import OutputError
from saferedir.engines.manifest import MANIFEST_FILE

#: Folder of a bundle's plans, and what lies in it.
PLANS = "plans"
PLAN_ENDINGS = (".plan", ".json", ".lock")
#: Bytes of a manifest, at most, that is looked at.
LARGEST_MANIFEST = 16_000_000

#: What a folder holds that is ours: raises `OutputError` where it is another's.
Ours = Callable[[Path], None]


def output_place(out: Path, inputs: Iterable[Path | str | None], ours: Ours, option: str = "--out") -> Path:
    """The folder that `out` means, links followed, if it may be written as a whole: absent, empty, or `ours`.

    Raises:
        OutputError: it holds something else, or is, holds or lies in one of `inputs`, of which those that do not exist, such as
            names on a hub, are left aside.
    """
    try:
        place = out.resolve()
        for given in inputs:
            if given is not None and Path(given).exists():
                refuse_overlap(out, place, Path(given), option)
        if place.exists() and not place.is_dir():
            raise OutputError(f"{option} {out} is no folder; name one that is new or empty")
        if place.is_dir() and any(place.iterdir()):
            ours(place)
    except (OSError, RuntimeError) as error:  # a loop of links is one or the other
        raise OutputError(f"{option} {out} cannot be written: {error}") from error
    return place


def refuse_overlap(out: Path, place: Path, given: Path, option: str) -> None:
    """Nothing, where the folder that `out` means, `place`, and `given` have nothing in common.

    Raises:
        OutputError: one is or holds the other.
    """
    source = given.resolve()
    if place == source:
        raise OutputError(f"{option} {out} is {given} itself, which is read; name a new folder")
    if place in source.parents:
        raise OutputError(f"{option} {out} holds {given}, which is read; name a new folder")
    if source in place.parents:
        raise OutputError(f"{option} {out} lies in {given}, which is read; name a folder elsewhere")


def expect_bundle(place: Path) -> None:
    """Nothing, where `place` is a bundle and holds nothing else.

    Raises:
        OutputError: says what it is or holds instead.
    """
    files = _stated_files(place / MANIFEST_FILE)
    if files is None:
        raise OutputError(f"{place} is neither empty nor a bundle, and is left as it is; name a new folder")
    known = {MANIFEST_FILE, *files}
    strange = [path.name for path in place.iterdir() if path.name not in known and not _is_plans(path)]
    if strange:
        named = ", ".join(sorted(strange)[:3])
        raise OutputError(f"{place} holds {named} beside its bundle, and is left as it is; name a new folder")


def put_in_place(folder: Path, out: Path) -> None:
    """Move a finished bundle to `out`, where nothing or an empty folder or a bundle is, which it replaces.

    Raises:
        OutputError: something else is there by now.
    """
    out = output_place(out, (), expect_bundle)
    folder.chmod(0o755)
    if not out.exists():
        os.replace(folder, out)
    elif not any(out.iterdir()):
        _fill(folder, out)
    elif out.is_mount() or out == Path.cwd():
        (out / MANIFEST_FILE).unlink()  # first, so that what is left where this is interrupted is no bundle
        for path in out.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        _fill(folder, out)
    else:
        aside = Path(tempfile.mkdtemp(prefix=f".{out.name}-replaced-", dir=out.parent)) / out.name
        os.replace(out, aside)
        try:
            os.replace(folder, out)
        except BaseException:
            os.replace(aside, out)
            aside.parent.rmdir()
            raise
        shutil.rmtree(aside.parent)


def _fill(folder: Path, out: Path) -> None:
    """Move what `folder` holds into `out`, the manifest last, since a folder with one is a bundle."""
    for path in sorted(folder.iterdir(), key=lambda path: path.name == MANIFEST_FILE):
        shutil.move(path, out / path.name)
    folder.rmdir()


def _stated_files(manifest: Path) -> list[str] | None:
    """The files that a manifest of ours lists, or None where it is none."""
    try:
        with manifest.open("rb") as file:
            raw = json.loads(file.read(LARGEST_MANIFEST))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(raw, dict) or not {"schema_version", "engines", "files", "made_with"} <= raw.keys():
        return None
    made_with, files = raw["made_with"], raw["files"]
    return list(files) if isinstance(made_with, dict) and "saferedir" in made_with and isinstance(files, dict) else None


def _is_plans(path: Path) -> bool:
    return (
        path.name == PLANS
        and not path.is_symlink()
        and all(plan.is_file() and plan.suffix in PLAN_ENDINGS for plan in path.iterdir())
    )
