"""The recipe's commands, in its order, with small numbers: on the embedded model, or on that of `SAFEREDIR_RECIPE_MODEL`."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from saferedir_torch.models import SHIPPED_MODEL

RECIPE = Path(__file__).parents[1] / "recipes" / "stable-diffusion-1.5"
#: What is added to a command so that it takes a minute.
SMALL = {
    "train": "--runs 24 --pair-count 24 --steps 8 --batch-scale 1",
    "calibrate": "--steps 4-6 --count 299 --centre-count 120 --rate 0.01",
    "verify": "--steps 2",
    "evaluate": "--steps 4 --count 1",
}
#: A judge, targets and an address are the user's own.
LEFT_OUT = ("attack", "serve")


@pytest.mark.slow
def test_the_recipe_goes_from_prompts_to_an_evaluated_bundle(tmp_path: Path) -> None:
    (block,) = re.findall(r"```sh\n(.*?)```", (RECIPE / "README.md").read_text(), re.DOTALL)
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "MODEL": os.environ.get("SAFEREDIR_RECIPE_MODEL", str(SHIPPED_MODEL)),
    }  # fmt: skip
    (tmp_path / "prompts.py").symlink_to(RECIPE / "prompts.py")
    ran = []
    for line in block.replace("\\\n", " ").splitlines():
        words = line.split()
        if words[0] == "python" or (words[0] == "saferedir" and words[1] not in LEFT_OUT):
            command = f"{line.replace('--precision fp16', '')} {SMALL.get(words[1], '')}"
            done = subprocess.run(
                ["bash", "-c", command], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, f"{command}\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}"
            ran.append(words[1])
    assert ran == ["prompts.py", "train", "calibrate", "export", "verify", "evaluate"]
    assert (tmp_path / "evaluation" / "index.html").is_file()
