"""How many threads an engine computes with on the CPU: as many as this process may use cores, unless it is told otherwise."""

from __future__ import annotations

import math
import os
from pathlib import Path

from saferedir.engines.errors import RequestError

#: Number of threads for every pipeline that is not told one.
VARIABLE = "SAFEREDIR_THREADS"
MOST = 1024


def thread_count(asked: int | None = None) -> int:
    """`asked`, or what the variable SAFEREDIR_THREADS says, or the cores that this process may use.

    Raises:
        RequestError: either is no whole number of 1 to 1024.
    """
    if asked is not None:
        return _checked("threads", asked)
    text = os.environ.get(VARIABLE, "").strip()
    if not text:
        return available_cores()
    return _checked(VARIABLE, int(text) if text.isdecimal() and len(text) < 10 else text)


def available_cores(root: Path = Path("/")) -> int:
    """Cores that this process may use: its affinity, or the quota of its control group where that is less, rounded up."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.ceil(min(cores, cpu_quota(root))))


def cpu_quota(root: Path = Path("/")) -> float:
    """Cores' worth of time that the control groups of this process allow, versions 1 and 2; infinite without a limit.

    A group's own limit and those above it hold. In a container the path may be the host's, of which only the end is here.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return math.inf
    quota = math.inf
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers and "cpu" not in controllers.split(","):
            continue
        for mount in (root / "sys/fs/cgroup" / name for name in ({controllers, "cpu"} if controllers else {""})):
            group = mount / path.strip("/")
            quota = min([quota, *(_limit(place) for place in (group, *group.parents) if place.is_relative_to(mount))])
    return quota


def _limit(group: Path) -> float:
    """Cores' worth of time that one group allows."""
    try:
        if (stated := group / "cpu.max").exists():
            most, period = stated.read_text().split()
        else:
            most, period = ((group / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return math.inf if most == "max" or int(most) <= 0 else int(most) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        return math.inf


def _checked(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MOST:
        raise RequestError(f"{name} is {value!r}; expected a whole number of 1 to {MOST}")
    return value
