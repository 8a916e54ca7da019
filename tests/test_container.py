"""The container file's own steps, run as a script in an empty environment."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from benchmarks.serving.served import free_port, is_ready

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_steps_of_the_container_file_serve_a_picture(tmp_path: Path) -> None:
    steps = re.findall(r"^(\w+) (.+)$", (ROOT / "Containerfile").read_text(), re.MULTILINE)
    place, data, environment = tmp_path / "environment", tmp_path / "data", tmp_path / "app"
    subprocess.run([sys.executable, "-m", "venv", place], check=True)
    subprocess.run(["git", "clone", "--quiet", "--depth", "1", f"file://{ROOT}", environment], check=True)
    variables = {**os.environ, "PATH": f"{place}/bin:{os.environ['PATH']}", "VIRTUAL_ENV": str(place)}
    variables.pop("PYTHONPATH", None)
    command: list[str] = []
    for name, value in steps:
        value = value.replace("/data", str(data))
        if name == "RUN":
            subprocess.run(value.replace("chown 1000", "ls -d"), shell=True, check=True, cwd=environment, env=variables)
        elif name == "ENV":
            variables.update([value.split("=", 1)])
        elif name == "CMD":
            command = json.loads(value)
    port = free_port()
    assert command[-2:] == ["--host", "0.0.0.0"]
    server = subprocess.Popen([f"{place}/bin/{command[0]}", *command[1:], "--port", str(port)], cwd=tmp_path, env=variables)
    try:
        until = time.monotonic() + 60
        while not is_ready(f"http://127.0.0.1:{port}"):
            assert server.poll() is None and time.monotonic() < until
            time.sleep(0.1)
        drawn = httpx.post(
            f"http://127.0.0.1:{port}/v1/images/generations", json={"prompt": "a cat", "quality": "low"}, timeout=60
        )
        assert drawn.status_code == 200 and (data / "audit.db").exists()
    finally:
        server.terminate()
        server.wait(60)
