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
    """Of each concept and family of attacks, which result has the latest row; of one stage, that of more pictures."""

    def __init__(self, results: Sequence[dict[str, Any]]) -> None:
        self._latest: dict[tuple[str, str], tuple[int, int]] = {}
        for result in results:
            if result.get("module") in STAGES:
                for family in result["families"]:
                    key, rank = (result["concept"], family), _rank(result, family)
                    self._latest[key] = max(self._latest.get(key, rank), rank)

    def superseded(self, result: dict[str, Any], family: str) -> bool:
        """Whether there is a later row; never of another module than the shipped one."""
        return result.get("module") in STAGES and _rank(result, family) < self._latest[result["concept"], family]


def _rank(result: dict[str, Any], family: str) -> tuple[int, int]:
    return STAGES.index(result.get("module")), result["families"][family]["pictures"]
