"""What is released: every file that a service installs is pinned by its hash, and listed with its licence."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path

from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
LOCKED = re.compile(
    r"^(?P<requirement>[a-z0-9][^\\\n]*?) \\\n(?P<hashes>(?:    --hash=sha256:[0-9a-f]{64}(?: \\)?\n)+)", re.MULTILINE
)


def locked() -> dict[str, str]:
    """Name -> version of every package that is installed here."""
    text = (ROOT / "requirements.txt").read_text()
    found = [Requirement(match["requirement"]) for match in LOCKED.finditer(text)]
    assert len(found) == len(re.findall(r"^[a-z0-9]", text, re.MULTILINE)), "a package without a hash"
    here = dict(default_environment())
    wanted = [one for one in found if one.marker is None or one.marker.evaluate(here)]
    return {canonicalize_name(one.name): str(one.specifier).removeprefix("==") for one in wanted}


def test_what_is_hashed_is_what_is_tested() -> None:
    tested = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    versions = {canonicalize_name(name): version for name, version in tested.items()}
    ours = locked()
    assert {name: version for name, version in ours.items() if versions.get(name, version) != version} == {}
    assert set(ours) <= set(versions)


def test_what_a_service_needs_is_hashed() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    asked = [Requirement(text) for text in (*project["dependencies"], *extras["cpu"], *extras["cli"], *extras["serve"])]
    ours = locked()
    for one in asked:
        if one.name != "saferedir":
            assert one.specifier.contains(ours[canonicalize_name(one.name)]), f"{one}: run make release"


def test_the_bill_of_materials_lists_it() -> None:
    bill = json.loads((ROOT / "sbom.cdx.json").read_text())
    listed = {canonicalize_name(one["name"]): one["version"] for one in bill["components"]}
    assert listed == locked()
    assert bill["metadata"]["component"]["name"] == "saferedir"
