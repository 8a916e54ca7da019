"""The command line as a user meets it: separate processes, output, exit codes."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from saferedir.runtime.demo import DEMO_PROMPTS

RUN = [sys.executable, "-m", "saferedir.runtime"]


def run(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([*RUN, *arguments], capture_output=True, cwd=cwd, check=False)


def failed(result: subprocess.CompletedProcess[bytes], code: int) -> str:
    """The one line on stderr of a run that ended with `code`."""
    text = result.stderr.decode().strip()
    assert result.returncode == code, text
    errors = [line for line in text.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "Traceback" not in text
    return errors[0]


def test_generate_writes_pictures_and_records(tmp_path: Path) -> None:
    out = tmp_path / "new" / "folder"
    result = run("generate", "a church", "a cat", "--steps", "4", "--seed", "9", "--out", str(out), "--json")
    assert result.returncode == 0, result.stderr
    records = json.loads(result.stdout)
    assert [Path(entry["file"]).name for entry in records] == ["0000-seed9.png", "0001-seed10.png"]
    assert [len(entry["steps"]) for entry in records] == [4, 4]
    assert Image.open(out / "0000-seed9.png").size == (64, 64)
    assert sorted(path.name for path in out.iterdir()) == ["0000-seed9.png", "0001-seed10.png"]


def test_generate_from_a_file_in_plain_words(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a cat\n\na dog\n")
    result = run("generate", "--file", "prompts.txt", "--count", "2", "--steps", "4", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert len(result.stdout.decode().strip().splitlines()) == 4


def test_generate_to_stdout_is_a_png() -> None:
    result = run("generate", "a cat", "--steps", "4", "--out", "-")
    assert result.returncode == 0, result.stderr
    assert Image.open(io.BytesIO(result.stdout)).size == (64, 64)


def test_unprotected_is_logged(tmp_path: Path) -> None:
    result = run("generate", "a cat", "--steps", "2", "--out", str(tmp_path), "--unprotected")
    assert b"switched OFF" in result.stderr
    assert b"unprotected" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["generate"], 2, "give prompts"),
        (["generate", "a cat", "--file", "x.txt"], 2, "not both"),
        (["generate", "--file", "missing.txt"], 2, "missing.txt cannot be read"),
        (["generate", "a cat", "--steps", "0"], 2, "num_inference_steps is 0"),
        (["generate", "a cat", "--seed", "18446744073709551616"], 2, "seed is 18446744073709551616"),
        (["generate", "a cat", "--count", "1000000000"], 2, "1000000000 pictures are asked for; expected at most 1000"),
        (["generate", "--file", "/dev/zero"], 2, "/dev/zero is larger than 16 MB"),
        (["generate", "a cat", "--threads", "0"], 2, "threads is 0; expected a whole number of 1"),
        (["generate", "a cat", "--concept", ""], 2, "unknown concept ''"),
        (["generate", "a cat", "--unprotected", "--concept", "ink"], 2, "leave everything else out"),
        (["generate", "a cat", "--size", "512"], 2, "this bundle draws 64x64"),
        (["generate", "a cat", "a dog", "--out", "-"], 2, "one PNG"),
        (["generate", "a cat", "--backend", "tpu"], 4, "'tpu' is unknown"),
        (["generate", "a cat", "--backend", "ort-cuda"], 4, "CUDAExecutionProvider"),
        (["generate", "a cat", "--bundle", "nowhere"], 3, "nowhere"),
        (["generate", "a cat", "--out", "/proc/nothing"], 6, "/proc/nothing cannot be written"),
        (["inspect", "nowhere"], 3, "nowhere"),
        (["inspect", "--plans", "ort-cuda"], 2, "tensorrt-rtx"),
    ],
)
def test_bad_input_is_one_line_and_its_exit_code(arguments: list[str], code: int, message: str, tmp_path: Path) -> None:
    assert message in failed(run(*arguments, cwd=tmp_path), code)
    assert list(tmp_path.iterdir()) == []


def cpu_seconds(pid: int) -> float:
    """CPU time that a process has taken so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_interrupted_run_leaves_nothing(tmp_path: Path) -> None:
    arguments = [*RUN, "generate", "a cat", "--steps", "50", "--count", "200", "--out", str(tmp_path)]
    # A job in the background may have been started with the signal ignored, which it would pass on.
    process = subprocess.Popen(
        arguments, stderr=subprocess.PIPE, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    )
    while process.poll() is None and cpu_seconds(process.pid) < 4:  # by then it draws, however busy the machine is
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGINT)
    assert process.wait(timeout=60) == 130
    assert list(tmp_path.iterdir()) == []


def test_inspect_says_what_is_in_the_bundle() -> None:
    text = run("inspect").stdout.decode()
    assert "emoji-diffusion" in text
    assert "church" in text
    assert "vae_decoder" in text
    assert json.loads(run("inspect", "--json").stdout)["name"] == "emoji-diffusion"


def test_doctor_names_the_extra_that_is_missing() -> None:
    said = b" ".join(run("doctor").stdout.split())
    assert b"saferedir[gpu]" in said


def test_doctor_lists_backends() -> None:
    result = run("doctor", "--json")
    assert result.returncode == 0, result.stderr
    backends = {entry["name"]: entry["available"] for entry in json.loads(result.stdout)["backends"]}
    assert backends["ort-cpu"] is True
    assert "torch" in backends
    assert b"ort-cpu" in run("doctor").stdout


def test_demo_makes_a_sheet_and_a_page(tmp_path: Path) -> None:
    result = run("demo", "--out", str(tmp_path))
    assert result.returncode == 0, result.stderr
    assert Image.open(tmp_path / "contact-sheet.png").width > 1000
    page = (tmp_path / "index.html").read_text()
    data = re.search(r'id="data">(.*?)</script>', page, re.DOTALL)
    assert data is not None and len(json.loads(data[1])["items"]) == len(DEMO_PROMPTS)
    assert "http" not in page.replace("http://www.w3.org/2000/svg", "")  # nothing from elsewhere
    assert b"index.html" in result.stdout.replace(b"\n", b"")


@pytest.mark.parametrize("command", [[], ["generate"], ["inspect"], ["verify"], ["doctor"], ["demo"]])
def test_help_has_examples(command: list[str]) -> None:
    result = run(*command, "--help")
    assert result.returncode == 0
    assert not command or b"saferedir " + command[0].encode() in result.stdout
