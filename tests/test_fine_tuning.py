"""Models made of the embedded one, and the shipped safety on them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from benchmarks.evaluate import app as evaluate
from benchmarks.html_report import write_report
from benchmarks.report import NETWORKS
from saferedir_torch.models import load_pipeline
from saferedir_torch.safety_module import parameters_sha256
from saferedir_torch.world.__main__ import app
from saferedir_torch.world.denoiser_training import Bank
from saferedir_torch.world.fine_tuning import distil, fine_tune
from saferedir_torch.world.judge import Judge
from saferedir_torch.world.scenes import Scene, draw, scattered

pytestmark = pytest.mark.usefixtures("small_training", "few_steps")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {
        "changed-pictures": fine_tune("changed-pictures", folder / "changed", steps=2, size=20),
        "few-step": distil(folder / "few", steps=2, size=20),
    }


@pytest.mark.parametrize("kind", ["changed-pictures", "few-step"])
def test_a_model_is_made_with_the_same_text_encoder(made: dict[str, Path], kind: str) -> None:
    shipped, other = load_pipeline(), load_pipeline(made[kind])
    assert parameters_sha256(other.text_encoder) == parameters_sha256(shipped.text_encoder)
    assert parameters_sha256(other.unet) != parameters_sha256(shipped.unet)
    assert (made[kind].parent / "samples.png").exists()
    assert type(other.scheduler).__name__ == {"few-step": "LCMScheduler"}.get(kind, "DDIMScheduler")


@pytest.mark.slow
def test_the_shipped_safety_is_tried_on_them(made: dict[str, Path], tmp_path: Path) -> None:
    options = ["--quick", "--out", str(tmp_path), "--work", str(tmp_path / "work")]
    result = CliRunner().invoke(evaluate, ["transfer", "--model", f"few={made['few-step']}", *options], catch_exceptions=False)
    assert result.exit_code == 0
    (entry,) = json.loads((tmp_path / "transfer.json").read_text())["entries"]
    assert (entry["model"], entry["module"], entry["steps"]) == ("few", "unchanged", 4)
    assert entry["benign_unchanged"]["of"] == 2
    assert "On other models" in write_report(tmp_path).read_text()


def test_other_pictures_show_the_same_scene_differently() -> None:
    scene = Scene(("church", "cat"), "glossy", "teal")
    own, other = (paint(scene, np.random.default_rng(1)) for paint in (draw, scattered))
    assert other.shape == own.shape
    assert other.dtype == own.dtype
    assert np.abs(own.astype(int) - other.astype(int)).mean() > 20
    bank = Bank.painted(load_pipeline(), scattered, 3, seed=0)
    assert torch.equal(bank.latents, Bank.painted(load_pipeline(), scattered, 3, seed=0).latents)


@pytest.mark.slow
def test_a_judge_of_changed_pictures_is_used_where_it_is_named(made: dict[str, Path], tmp_path: Path) -> None:
    train = ["second-judge", "--pictures", "changed-pictures", "--start-from", str(NETWORKS / "second_judge"), "--steps", "1"]
    assert CliRunner().invoke(app, [*train, "--folder", str(tmp_path)], catch_exceptions=False).exit_code == 0
    judge = Judge.load(tmp_path / "second_judge")
    assert judge.architecture == "residual"

    model, options = (
        f"changed={made['changed-pictures']}",
        ["--quick", "--out", str(tmp_path), "--work", str(tmp_path / "work")],
    )
    command = ["transfer", "--model", model, "--judge", f"changed={tmp_path / 'second_judge'}", *options]
    with pytest.MonkeyPatch.context() as patch:
        asked: list[int] = []
        patch.setattr(judge, "judge", lambda pictures: asked.append(len(pictures)) or type(judge).judge(judge, pictures))
        patch.setattr(
            Judge, "load", lambda folder, load=Judge.load: judge if folder == tmp_path / "second_judge" else load(folder)
        )
        assert CliRunner().invoke(evaluate, command, catch_exceptions=False).exit_code == 0
    assert asked


@pytest.mark.parametrize(("judge", "named"), [(f"many={NETWORKS / 'judge'}", "many"), ("few=tests", "tests")])
def test_a_judge_that_does_not_fit_is_named(made: dict[str, Path], tmp_path: Path, judge: str, named: str) -> None:
    command = ["transfer", "--model", f"few={made['few-step']}", "--judge", judge, "--out", str(tmp_path)]
    result = CliRunner().invoke(evaluate, command)
    assert result.exit_code == 2
    assert named in result.output


@pytest.mark.parametrize(
    ("command", "named"),
    [
        (["fine-tune", "--kind", "magic"], "magic"),
        (["second-judge", "--pictures", "magic"], "magic"),
        (["second-judge", "--start-from", "nowhere"], "nowhere"),
        (["second-judge", "--start-from", str(NETWORKS / "judge")], "first"),
    ],
)
def test_what_is_not_known_is_named(command: list[str], named: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, [*command, "--folder", str(tmp_path)])
    assert result.exit_code == 2
    assert named in result.output
