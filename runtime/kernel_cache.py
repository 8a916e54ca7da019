"""Kernels that TensorRT-RTX compiles on the card when shapes are first met, kept in the user's cache for the next process."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from saferedir.engines.errors import OutputError, PlanError
from saferedir.engines.plan_cache import user_cache
from saferedir.engines.whole_file import write_bytes

log = logging.getLogger("saferedir")


class KernelCache:
    """The compiled kernels of one plan. TensorRT-RTX itself refuses those of another card, driver or version."""

    def __init__(self, plan: Path, config: Any) -> None:
        """Put into `config`, a runtime configuration, what was kept for `plan`."""
        self.path = _path(plan)
        self._kernels = config.create_runtime_cache()
        if self.path is not None and self.path.exists() and not self._kernels.deserialize(self.path.read_bytes()):
            log.info("kernels in %s are another card's, driver's or version's; they are compiled again", self.path)
        config.set_runtime_cache(self._kernels)
        self._met: set[tuple[tuple[int, ...], ...]] = set()
        self._grown = False

    def meet(self, shapes: tuple[tuple[int, ...], ...]) -> None:
        """Say that a call with inputs of these shapes is made, which compiles kernels where it is the first."""
        self._grown |= shapes not in self._met
        self._met.add(shapes)

    def keep(self) -> None:
        """Write the kernels where there may be new ones; a cache that cannot be written costs time alone, and is said."""
        if not self._grown or self.path is None:
            return
        self._grown = False
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_bytes(self.path, bytes(self._kernels.serialize()))
        except (OSError, OutputError) as error:
            log.warning("compiled kernels are not kept: %s", error)


def _path(plan: Path) -> Path | None:
    """Where the kernels of a plan are kept, or None, which is said, where the user has no cache."""
    try:
        return user_cache() / "kernels" / f"{plan.stem}.kernels"
    except PlanError as error:
        log.warning("compiled kernels are not kept: %s", error)
        return None
