"""Debian's PostgreSQL, started by the tests in a folder of their own."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

#: The server refuses to run as root; this user is its package's.
USER = "postgres"


def _binaries() -> Path | None:
    packaged = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    found = shutil.which("postgres")
    return packaged[-1] if packaged else Path(found).parent if found else None


@contextmanager
def postgresql() -> Iterator[str]:
    """The URL of a new, empty database."""
    binaries = _binaries()
    if binaries is None:
        pytest.skip("PostgreSQL is not installed")
    user = USER if os.getuid() == 0 else None
    with tempfile.TemporaryDirectory(prefix="pg") as place:
        if user is not None:
            account = pwd.getpwnam(user)
            os.chown(place, account.pw_uid, account.pw_gid)
        data = Path(place) / "data"
        subprocess.run(
            [binaries / "initdb", "-D", data, "-U", "audit", "-A", "trust", "--no-sync", "-E", "UTF8"],
            user=user, check=True, capture_output=True, cwd=place,
        )  # fmt: skip
        server = subprocess.Popen(
            [binaries / "postgres", "-D", data, "-k", place, "-c", "listen_addresses=", "-c", "fsync=off"],
            user=user, cwd=place, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            until = time.monotonic() + 60
            while not (Path(place) / ".s.PGSQL.5432").exists():
                assert server.poll() is None and time.monotonic() < until, "PostgreSQL did not start"
                time.sleep(0.05)
            time.sleep(0.3)
            yield f"postgresql+psycopg://audit@/postgres?host={place}"
        finally:
            server.terminate()
            server.wait(30)
