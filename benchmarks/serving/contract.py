"""Cases that schemathesis makes of the service's own description, against a service that is up.

`python -m benchmarks.serving.contract --cases 10000`: no answer may break the description, none be 5xx.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.report import environment, save
from benchmarks.serving.served import running

#: Not asked: whether what the description allows is drawn, since it cannot say which sizes and samplers a bundle has.
NOT_ASKED = "positive_data_acceptance"


def contract(cases: int, folder: Path, seed: int, *arguments: str) -> dict[str, Any]:
    """Make so many cases, about evenly of all endpoints that take something; what was found wrong."""
    with running(folder, *arguments) as (_, address):
        report = folder / "report.ndjson"
        command = [
            sys.executable, "-c", "from schemathesis.cli import schemathesis; schemathesis()", "run", f"{address}/openapi.json",
            "--checks", "all", "--exclude-checks", NOT_ASKED, "--max-examples", str(cases), "--seed", str(seed),
            "--report", "ndjson", "--report-ndjson-path", str(report), "--request-timeout", "60", "--no-color",
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)
    sent, statuses = 0, dict[str, int]()
    for line in report.read_text().splitlines():
        for status in _statuses(json.loads(line)):
            sent += 1
            statuses[str(status)] = statuses.get(str(status), 0) + 1
    return {"cases": sent, "statuses": statuses, "passed": done.returncode == 0, "said": done.stdout[-6000:]}


def _statuses(node: Any) -> list[int]:
    """Of every answer in a part of the report."""
    if isinstance(node, dict):
        own = [node["status_code"]] if isinstance(node.get("status_code"), int) else []
        return own + [status for value in node.values() for status in _statuses(value)]
    return [status for value in node for status in _statuses(value)] if isinstance(node, list) else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=10_000, help="of each endpoint at most")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures = contract(options.cases, Path(folder), options.seed)
    Console().print(environment()["machine"], figures["said"], f"{figures['cases']} cases, {figures['statuses']}")
    print(save("contract", figures))
    sys.exit(0 if figures["passed"] else 1)


if __name__ == "__main__":
    main()
