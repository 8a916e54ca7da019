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
from saferedir_torch.models import load_pipeline
from saferedir_torch.safety_module import parameters_sha256
from saferedir_torch.world.__main__ import app
from saferedir_torch.world.denoiser_training import Bank
from saferedir_torch.world.fine_tuning import distil, fine_tune
from saferedir_torch.world.scenes import Scene, draw, scattered


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


def test_an_unknown_kind_is_named(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["fine-tune", "--kind", "magic", "--folder", str(tmp_path)])
    assert result.exit_code == 2
    assert "magic" in result.output
