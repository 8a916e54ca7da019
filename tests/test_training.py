"""Training resumes where it was, refuses what is not finite, and produces a module that loads."""

from __future__ import annotations

import contextlib
import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from msgspec import structs
from torch import nn

from saferedir.engines.errors import RequestError, TrainingError
from saferedir_torch.config import SafetyConfig
from saferedir_torch.models import SHIPPED_SAFETY, load_pipeline
from saferedir_torch.pairs_file import FilePrompts
from saferedir_torch.safety_module import SafetyModule
from saferedir_torch.train import train
from saferedir_torch.training_data import record_runs
from saferedir_torch.training_run import ExponentialAverage, Schedule, run_training
from saferedir_torch.trajectories import encode
from saferedir_torch.world.base import train_base
from saferedir_torch.world.source import WorldPrompts
from saferedir_torch.world.split import load_split

pytestmark = pytest.mark.usefixtures("small_training")


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
    assert rows == ["25", "50", "60"]


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
    options: dict[str, Any] = {"runs": 4, "pairs": 12, "samplings": [(3, 5.0)], "batch_scale": 2}
    module = train(eager, WorldPrompts(["church"], load_split()), tmp_path, steps=3, **options)
    torch.testing.assert_close(module.last_branch.refuge, encode(eager, ["a house"])[1])
    loaded = SafetyModule.load(tmp_path / "safety")
    assert loaded.config == module.config
    for name, tensor in module.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor.half().float())
    assert module.config.provenance["steps"] == 3


def test_training_on_a_users_pairs_resumes_and_draws_its_losses(eager: Any, tmp_path: Path) -> None:
    pairs = [{"unsafe": f"a castle {where}", "safe": f"a house {where}"} for where in ("on blue", "next to a cat")]
    (tmp_path / "pairs.json").write_text(json.dumps({"castle": pairs, "benign": ["a dog"]}))
    source = FilePrompts(tmp_path / "pairs.json")
    options: dict[str, Any] = {"runs": 2, "pairs": 12, "samplings": [(2, 5.0)]}
    train(eager, source, tmp_path / "out", steps=2, **options)
    recorded = (tmp_path / "out" / "runs.safetensors").stat().st_mtime_ns
    module = train(eager, source, tmp_path / "out", steps=4, **options)
    assert (tmp_path / "out" / "runs.safetensors").stat().st_mtime_ns == recorded
    rows = [row["step"] for row in csv.DictReader((tmp_path / "out" / "safety.csv").open())]
    assert rows == ["2", "4"]
    assert (tmp_path / "out" / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert module.config.concept_names == ["castle"]
    best = tmp_path / "out" / "best.safetensors.ckpt"
    best.write_bytes(best.read_bytes()[:1000])
    with pytest.raises(TrainingError, match=r"best\.safetensors\.ckpt is cut short"):
        train(eager, source, tmp_path / "out", steps=4, **options)


def test_recorded_runs_that_do_not_serve(eager: Any, tmp_path: Path) -> None:
    source = WorldPrompts(["church"], load_split())
    train(eager, source, tmp_path / "church", steps=1, runs=2, pairs=8, samplings=[(2, 5.0)])
    with pytest.raises(TrainingError, match="there are none of ink"):
        train(eager, WorldPrompts(["ink"], load_split()), tmp_path / "ink", steps=1, pairs=8, runs_from=tmp_path / "church")
    runs = tmp_path / "church" / "runs.safetensors"
    runs.write_bytes(runs.read_bytes()[:2000])
    with pytest.raises(TrainingError, match=r"runs\.safetensors holds no recorded runs"):
        train(eager, source, tmp_path / "church", steps=1, runs=2, pairs=8)


def test_banks_are_cut_and_joined_run_by_run(eager: Any) -> None:
    source = WorldPrompts(["church", "ink"], load_split())
    bank = record_runs(eager, source, count=2, seed=0, samplings=[(2, 5.0)])
    church = bank.asked[:, 0] > 0
    left = bank.without("church")
    asking = torch.isin(bank.run, bank.run[church])
    assert len(left.run) == int((~asking).sum())
    assert not (left.asked[:, 0] > 0).any()
    assert torch.equal(torch.unique(left.run), torch.arange(int(left.run.max()) + 1))
    both = left.joined(bank)
    assert torch.equal(both.prompts[both.prompt[len(left.run) :]], bank.prompts[bank.prompt])
    assert int(both.run.max()) == int(left.run.max()) + 1 + int(bank.run.max())


def test_a_model_without_cross_attention_is_refused(eager: Any, tmp_path: Path) -> None:
    deaf = UNet2DConditionModel(
        sample_size=16, in_channels=4, out_channels=4, block_out_channels=(32,), norm_num_groups=8, layers_per_block=1,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), mid_block_type=None, cross_attention_dim=128,
    )  # fmt: skip
    pipeline = StableDiffusionPipeline(
        vae=eager.vae, text_encoder=eager.text_encoder, tokenizer=eager.tokenizer, unet=deaf, scheduler=eager.scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    with pytest.raises(TrainingError, match="no cross-attention"):
        train(pipeline, WorldPrompts(["church"], load_split()), tmp_path, steps=1)


def test_a_modules_hash_is_of_all_that_decides() -> None:
    module = SafetyModule.load(SHIPPED_SAFETY)
    assert module.sha256() == SafetyModule.load(SHIPPED_SAFETY).sha256()
    seen = {module.sha256()}
    for name in ("levels", "gains"):
        getattr(module.last_branch, name).add_(1)
        seen.add(module.sha256())
    concepts = module.config.concepts
    module.config = structs.replace(module.config, concepts=(structs.replace(concepts[0], threshold=0.9), *concepts[1:]))
    seen.add(module.sha256())
    assert len(seen) == 4


def test_module_files_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"config\.json"):
        SafetyModule.load(tmp_path)
    SafetyConfig.load(SHIPPED_SAFETY / "config.json").save(tmp_path / "config.json")
    with pytest.raises(RequestError, match=r"model\.safetensors"):
        SafetyModule.load(tmp_path)
    weights = (SHIPPED_SAFETY / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights[:1000])
    with pytest.raises(RequestError, match=r"model\.safetensors"):
        SafetyModule.load(tmp_path)
