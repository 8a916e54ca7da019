"""What a table that takes hours takes over from an earlier result of its own."""

from __future__ import annotations

import json
from collections.abc import Container
from pathlib import Path
from typing import Any

from saferedir_torch.peers.saferedir import SafeRedir
from saferedir_torch.safety_module import SafetyModule


class EarlierResultError(ValueError):
    """A result that nothing can be taken from: another module's or task's, or none at all."""


def entries_of_others(path: Path, module: SafetyModule, models: Container[str]) -> list[dict[str, Any]]:
    """Of an earlier transfer table of `module` the entries of all but `models`, each with the environment that it was measured
    in.

    Raises:
        EarlierResultError: there is no such result, or it is of another module.
    """
    earlier = _read(path, "safety", "environment", "entries")
    of, made_in = earlier["safety"], earlier["environment"]
    if of != module.sha256():
        raise EarlierResultError(f"{path} is of another module ({of[:12]}), this is {module.sha256()[:12]}: measure all anew")
    return [{"environment": made_in, **entry} for entry in earlier["entries"] if entry["model"] not in models]


def rows_of_methods(path: Path, task: str, model: str, safety: str) -> dict[str, dict[str, Any]]:
    """By method, the rows of an earlier peers' table of `task` and of the model with that hash, each with the environment that
    its pictures were drawn in. SafeRedir's own is among them where it is of the `safety` module with that hash.

    Raises:
        EarlierResultError: there is no such result, or it is of another task or model.
    """
    earlier = _read(path, "concept", "model", "environment", "rows")
    of, drawn_by, made_in = (earlier[key] for key in ("concept", "model", "environment"))
    if of != task:
        raise EarlierResultError(f"{path} is of {of}, not of {task}")
    if drawn_by != model:
        raise EarlierResultError(f"{path} is of another model ({drawn_by[:12]}), this is {model[:12]}: measure all anew")
    others = [row for row in earlier["rows"] if row["method"] != SafeRedir.name or earlier.get("safety") == safety]
    return {row["method"]: {"environment": made_in, **row} for row in others}


def _read(path: Path, *keys: str) -> dict[str, Any]:
    try:
        earlier = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise EarlierResultError(f"{path} is no earlier result with {', '.join(keys)} ({error!r})") from error
    if missing := [key for key in keys if not isinstance(earlier, dict) or key not in earlier]:
        raise EarlierResultError(f"{path} is no earlier result with {', '.join(keys)} (no {missing[0]!r})")
    return dict(earlier)
