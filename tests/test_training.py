"""Training resumes where it was, refuses what is not finite, and produces a module that loads."""

from __future__ import annotations

import contextlib
import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from saferedir_torch.config import SafetyConfig, SafetyConfigError
from saferedir_torch.models import SHIPPED_SAFETY, load_pipeline
from saferedir_torch.safety_module import SafetyModule
from saferedir_torch.train import train
from saferedir_torch.training_run import ExponentialAverage, Schedule, TrainingError, run_training
from saferedir_torch.world.base import train_base
from saferedir_torch.world.split import load_split


def linear_run(folder: Path, steps: int, *, total: int = 60, poison_at: int | None = None) -> nn.Linear:
    """A small regression that stops after `steps` of `total`."""
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    average = ExponentialAverage(model)

    def loss_of_step(step: int) -> tuple[torch.Tensor, dict[str, float]]:
        if step == steps:
            raise KeyboardInterrupt
        inputs = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
        loss = (model(inputs) - inputs.sum(1, keepdim=True)).square().mean()
        return (loss * float("nan") if step == poison_at else loss), {"twice": 2 * float(loss.detach())}

    with contextlib.suppress(KeyboardInterrupt):
        run_training(
            folder=folder, name="line", modules={"line": model}, optimizer=optimizer,
            schedule=Schedule(total_steps=total, warmup_steps=5), loss_of_step=loss_of_step,
            averages={"line": average}, checkpoint_every_s=0,
        )  # fmt: skip
    return model


def test_interrupted_training_ends_where_an_uninterrupted_one_does(tmp_path: Path) -> None:
    whole = linear_run(tmp_path / "whole", -1)
    linear_run(tmp_path / "parts", 31)
    parts = linear_run(tmp_path / "parts", -1)
    assert torch.equal(whole.weight, parts.weight)
    rows = [row["step"] for row in csv.DictReader((tmp_path / "parts" / "line.csv").open())]
    assert rows == ["25", "50"]


def test_nan_loss_keeps_the_last_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="step 40"):
        linear_run(tmp_path, -1, poison_at=40)
    assert torch.load(tmp_path / "line.ckpt", weights_only=True)["step"] == 40


def test_checkpoint_cut_short_is_a_clear_error(tmp_path: Path) -> None:
    linear_run(tmp_path, 20)
    data = (tmp_path / "line.ckpt").read_bytes()
    (tmp_path / "line.ckpt").write_bytes(data[: len(data) // 2])
    with pytest.raises(TrainingError, match=r"line\.ckpt"):
        linear_run(tmp_path, -1)


def test_base_training_reaches_every_layer(tmp_path: Path) -> None:
    pipe = load_pipeline()
    for part, name in ((pipe.tokenizer, "tokenizer"), (pipe.text_encoder, "clip"), (pipe.vae, "vae")):
        part.save_pretrained(tmp_path / name)
    np.save(tmp_path / "latents.npy", np.random.default_rng(0).standard_normal((64, 4, 16, 16)).astype(np.float16))
    train_base(tmp_path, steps=1)
    state = torch.load(tmp_path / "base.ckpt", weights_only=True)["optimizer"]["state"]
    assert len(state) > 200
    assert all(bool((moments["exp_avg"] != 0).any()) for moments in state.values())


@pytest.fixture(scope="module")
def eager() -> Any:
    return load_pipeline()


def test_a_short_training_makes_a_module_that_loads(eager: Any, tmp_path: Path) -> None:
    module = train(eager, load_split(), tmp_path, steps=3, runs=8, pairs=12)
    loaded = SafetyModule.load(tmp_path / "safety")
    assert loaded.config == module.config
    for name, tensor in module.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor.half().float())
    assert module.config.provenance["steps"] == 3


def test_module_files_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(SafetyConfigError, match=r"config\.json"):
        SafetyModule.load(tmp_path)
    SafetyConfig.load(SHIPPED_SAFETY / "config.json").save(tmp_path / "config.json")
    with pytest.raises(SafetyConfigError, match=r"model\.safetensors"):
        SafetyModule.load(tmp_path)
    weights = (SHIPPED_SAFETY / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights[:1000])
    with pytest.raises(SafetyConfigError, match=r"model\.safetensors"):
        SafetyModule.load(tmp_path)
