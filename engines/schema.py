"""The JSON schema of a bundle's manifest, as msgspec states it of the structures that read one."""

from __future__ import annotations

from typing import Any

import msgspec

from saferedir.engines.manifest import Manifest


def manifest_schema() -> dict[str, Any]:
    """The schema (JSON Schema 2020-12) that `bundle.schema.json` holds."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "bundle.json"} | msgspec.json.schema(Manifest)
