"""Who may import whom. Imports inside functions count as well: a wall has no back door but those that are named here."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
#: Folder -> the name it is imported by.
PACKAGES = {
    "engines": "saferedir.engines",
    "runtime": "saferedir.runtime",
    "export": "saferedir.export",
    "saferedir_torch": "saferedir_torch",
}
TRAINING = ("torch", "diffusers", "transformers", "saferedir_torch")
#: Rooms of the training package that are no part of the method.
ROOMS = ("world", "peers", "attacks", "command_line")


def imported(path: Path) -> Iterator[str]:
    """Modules that a file imports anywhere but for annotations alone, absolute."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    unused = {id(inner) for node in ast.walk(tree) if _for_types(node) for inner in ast.walk(node)}
    for node in ast.walk(tree):
        if id(node) in unused:
            continue
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            yield from (f"{node.module}.{name.name}" for name in node.names)


def _for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def crossings(folder: str, forbidden: tuple[str, ...], leave_out: tuple[str, ...] = ()) -> set[str]:
    """`file imports module` for every import of something forbidden below `folder`."""
    found = set()
    for path in sorted((ROOT / folder).rglob("*.py")):
        name = path.relative_to(ROOT).as_posix()
        if not name.startswith(leave_out):
            found |= {
                f"{name} imports {module}"
                for module in imported(path)
                if any(module == wall or module.startswith(f"{wall}.") for wall in forbidden)
            }
    return found


def test_the_bundle_format_knows_nobody() -> None:
    assert crossings("engines", ("saferedir.runtime", "saferedir.export", *TRAINING)) == set()


def test_the_runtime_never_imports_training_code() -> None:
    assert crossings("runtime", TRAINING) == set()


@pytest.mark.parametrize("room", ROOMS)
def test_the_method_does_not_know(room: str) -> None:
    rooms = tuple(f"saferedir_torch/{own}/" for own in ROOMS)
    assert crossings("saferedir_torch", (f"saferedir_torch.{room}",), leave_out=rooms) == set()


def test_other_methods_and_attacks_do_not_choose_their_own_world() -> None:
    assert crossings("saferedir_torch/attacks", ("saferedir_torch.world",)) == set()
    assert crossings("saferedir_torch/peers", ("saferedir_torch.world",)) == set()


def test_training_does_not_know_what_its_modules_are_exported_to() -> None:
    assert crossings("saferedir_torch", ("saferedir.export", "saferedir.runtime")) == set()


def test_export_knows_of_the_runtime_only_what_it_checks_its_work_with() -> None:
    allowed = {
        "export/bisect.py imports saferedir.runtime.installation.import_onnxruntime",
        "export/capture.py imports saferedir.runtime.installation.import_onnxruntime",
        "export/rounded.py imports saferedir.runtime.ort.OrtBackend",
        "export/scheduler_config.py imports saferedir.runtime.schedulers.make_schedule",
    }
    assert crossings("export", ("saferedir.runtime",)) == allowed


def test_every_package_is_declared() -> None:
    declared = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for folder, name in PACKAGES.items():
        for init in sorted((ROOT / folder).rglob("__init__.py")):
            package = ".".join([name, *init.parent.relative_to(ROOT / folder).parts])
            assert f'"{package}"' in declared, package


def test_the_runtime_needs_nothing_of_the_service() -> None:
    serving = ("saferedir.runtime.serve", "fastapi", "granian", "pydantic", "sqlalchemy", "prometheus_client", "ray")
    assert crossings("runtime", serving, ("runtime/serve/",)) == set()
