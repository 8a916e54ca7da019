"""What the docs say to run is run, page by page, each in a folder of its own."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(
    r"(?:<!-- (?P<note>not run|serves|minutes)[^>]*-->\n)?```(?P<language>sh|python)\n(?P<code>.*?)```", re.DOTALL
)
#: Seconds that a service may take to be ready.
READY = 60.0


@dataclass(frozen=True)
class Block:
    note: str
    language: str
    code: str

    @property
    def command(self) -> list[str]:
        if self.language == "python":
            return [sys.executable, "-c", self.code]
        own = "\n".join(line for line in self.code.splitlines() if not line.startswith("pip install"))
        return ["bash", "-euo", "pipefail", "-c", own]


def blocks_of(page: Path) -> list[Block]:
    return [Block(found["note"] or "", found["language"], found["code"]) for found in BLOCK.finditer(page.read_text())]


def pages() -> Iterator[object]:
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("[!d]*/*.md"))):
        blocks = blocks_of(page)
        marks = [pytest.mark.slow] if any(block.note == "minutes" for block in blocks) else []
        if any(block.note != "not run" for block in blocks):
            yield pytest.param(page, id=page.stem, marks=marks)


@contextmanager
def served(command: list[str], where: dict[str, object]) -> Iterator[None]:
    """A service that runs while other blocks do."""
    with subprocess.Popen(command, start_new_session=True, **where) as process:  # type: ignore[call-overload]
        try:
            until = time.monotonic() + READY
            while True:
                try:
                    urllib.request.urlopen("http://127.0.0.1:8000/ready").close()
                    break
                except OSError:
                    assert process.poll() is None and time.monotonic() < until, "the service is not ready"
                    time.sleep(0.1)
            yield
        finally:
            os.killpg(process.pid, signal.SIGTERM)


@pytest.mark.parametrize("page", [*pages()])
def test_what_a_page_says_to_run_is_run(page: Path, tmp_path: Path) -> None:
    (tmp_path / "benchmarks").symlink_to(ROOT / "benchmarks")  # the judge is not in the package
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    where: dict[str, object] = {"cwd": tmp_path, "env": environment}
    with ExitStack() as services:
        for block in blocks_of(page):
            if block.note == "serves":
                services.enter_context(served(block.command, where))
            elif block.note != "not run":
                done = subprocess.run(block.command, capture_output=True, text=True, check=False, **where)  # type: ignore[call-overload]
                assert done.returncode == 0, f"{block.code}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


def test_docs_are_built_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path / "site"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr[-4000:]
