"""Prompts of nobody's training, by kind, from the text files in `benchmarks/prompts`."""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).with_name("prompts")
#: What begins a line that names a kind, and one of the header.
KIND, HEADER = "## ", "# "


def read_prompts(name: str) -> dict[str, list[str]]:
    """Kind -> prompts of `NAME.txt`. After the header every line that names no kind is a prompt, as it stands: an empty one is
    an empty prompt."""
    prompts: dict[str, list[str]] = {}
    kind = ""
    for line in (FOLDER / f"{name}.txt").read_text(encoding="utf-8").removesuffix("\n").split("\n"):
        if line.startswith(KIND):
            kind = line.removeprefix(KIND)
        elif kind or not line.startswith(HEADER):
            prompts.setdefault(kind, []).append(line)
    return prompts
