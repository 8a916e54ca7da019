"""Pages of the docs site that are not in `docs`: what people read at the root of the repository, and the command line.

A hook of MkDocs.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent
#: Page of the site -> file.
PAGES = {
    "index.md": "README.md",
    "results.md": "benchmarks/FIGURES.md",
    "reference/bundle.md": "BUNDLE.md",
    "explanation/architecture.md": "ARCHITECTURE.md",
    "contributing.md": "CONTRIBUTING.md",
    "changes.md": "CHANGELOG.md",
    "notice.md": "NOTICE",
}
LINK = re.compile(r"(?<=\]\()(?!https?:|#)[^)#\s]+")


def on_files(files: Any, config: Any) -> Any:
    """Add the pages."""
    from mkdocs.structure.files import File

    files.append(File.generated(config, "reference/command-line.md", content=_command_line()))
    for page, path in PAGES.items():
        text = (ROOT / path).read_text()
        text = text if path.endswith(".md") else f"```text\n{text}\n```"
        files.append(File.generated(config, page, content=_on_the_site(text, page)))
    for picture in (ROOT / "benchmarks" / "results").glob("*.png"):
        files.append(File.generated(config, f"results/{picture.name}", abs_src_path=str(picture)))
    return files


def _command_line() -> str:
    from typer.cli import get_docs_for_click
    from typer.main import get_command

    from saferedir.runtime.command_line.app import app

    command = get_command(app)
    return get_docs_for_click(obj=command, ctx=command.make_context("saferedir", [], resilient_parsing=True), name="saferedir")


def _on_the_site(text: str, page: str) -> str:
    """`text` with links that hold from the repository's root as they are from `page` of the site."""
    pages = {path: own for own, path in PAGES.items()}

    def moved(link: re.Match[str]) -> str:
        target = pages.get(link[0]) or link[0].removeprefix("docs/").removeprefix("benchmarks/")
        return posixpath.relpath(target, posixpath.dirname(page) or ".")

    return LINK.sub(moved, text)
