"""The shipped module at earlier times: of what has not been measured again since, an earlier figure stands, and says so."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

#: What a result states as its `module`, the oldest first; the present one states none.
STAGES = (
    "before the first step's levels",
    "before masks heeded how sure they are",
    "before look-alike letters were read as plain ones",
    None,
)


class LatestRows:
    """Of each concept and family of attacks, which of several results has the latest row."""

    def __init__(self, results: Sequence[dict[str, Any]]) -> None:
        self._latest: dict[tuple[str, str], int] = {}
        for result in results:
            if result.get("module") in STAGES:
                for family in result["families"]:
                    key = (result["concept"], family)
                    self._latest[key] = max(self._latest.get(key, 0), STAGES.index(result.get("module")))

    def superseded(self, result: dict[str, Any], family: str) -> bool:
        """Whether there is a later row; never of another module than the shipped one."""
        stage = result.get("module")
        return stage in STAGES and STAGES.index(stage) < self._latest[result["concept"], family]
