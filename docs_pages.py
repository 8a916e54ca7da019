"""Pages of the docs site that are not in `docs`: what people read at the root of the repository, command line and licences.

A hook of MkDocs.
"""

from __future__ import annotations

import json
import posixpath
import re
from importlib.metadata import entry_points
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
        files.append(File.generated(config, page, content=_on_the_site(text, path, page)))
    for picture in (ROOT / "benchmarks" / "results").glob("*.png"):
        files.append(File.generated(config, f"results/{picture.name}", abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Put a table where a page asks for it, and let links to files at the root lead to their pages."""
    for mark, table in (("<!-- licences -->", _licences), ("<!-- settings -->", _settings)):
        if mark in markdown:
            markdown = markdown.replace(mark, table())
    own = page.file.src_uri
    generated = own in PAGES or own == "reference/command-line.md"
    return markdown if generated else _on_the_site(markdown, f"docs/{own}", own)


def _settings() -> str:
    """A table of every setting of a service."""
    from saferedir.runtime.serve.settings import Settings

    rows = ["| setting | default | |", "| --- | --- | --- |"]
    for name, field in Settings.model_fields.items():
        default = "" if field.default is None or str(field.default) == "" else f"`{field.default}`"
        rows.append(f"| `{name}` | {default} | {field.description or ''} |")
    return "\n".join(rows)


def _licences() -> str:
    """A table of every package in the bill of materials."""
    rows = ["| package | version | licence |", "| --- | --- | --- |"]
    for component in json.loads((ROOT / "sbom.cdx.json").read_text())["components"]:
        stated = [
            said.get("expression") or said["license"].get("id") or said["license"]["name"]
            for said in component.get("licenses", [])
        ]
        names = [name for name in stated if not name.startswith("License ::")] or [name.split(" :: ")[-1] for name in stated]
        rows.append(f"| {component['name']} | {component['version']} | {', '.join(names) or 'stated in its files only'} |")
    return "\n".join(rows)


def _command_line() -> str:
    from typer.cli import get_docs_for_click
    from typer.main import get_command

    from saferedir.runtime.command_line.app import app

    def documented(command: Any, name: str) -> str:
        return get_docs_for_click(obj=command, ctx=command.make_context(name, [], resilient_parsing=True), name=name)

    own = documented(get_command(app), "saferedir")
    for entry in sorted(entry_points(group="saferedir.commands")):
        stub = rf"## `saferedir {entry.name}`.*?(?=^## |\Z)"
        whole = documented(get_command(entry.load()), f"saferedir {entry.name}").replace("# `", "## `")
        own = re.sub(stub, lambda _, text=whole: f"{text}\n", own, flags=re.DOTALL | re.MULTILINE)
    return own


def _on_the_site(text: str, path: str, page: str) -> str:
    """`text` of the file `path`, whose links hold in the repository, with such that hold from `page` of the site."""
    pages = {file: own for own, file in PAGES.items()}

    def moved(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(path), link[0]))
        own = pages.get(target) or target.removeprefix("docs/").removeprefix("benchmarks/")
        return posixpath.relpath(own, posixpath.dirname(page) or ".")

    return LINK.sub(moved, text)
