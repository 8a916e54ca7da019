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
from small_module import small_module
from small_runs import small_bank
from torch import nn

from saferedir.engines.errors import RequestError, TrainingError
from saferedir.engines.manifest import Envelope
from saferedir_torch.models import load_pipeline
from saferedir_torch.pairs_file import FilePrompts
from saferedir_torch.safety_module import SafetyModule
from saferedir_torch.train import _clean, train
from saferedir_torch.training_run import ExponentialAverage, Schedule, run_training
from saferedir_torch.trajectories import encode
from saferedir_torch.world.base import train_base
from saferedir_torch.world.source import WorldPrompts
from saferedir_torch.world.split import load_split

pytestmark = pytest.mark.usefixtures("small_training")
#: Of a training that takes seconds: some runs are held out, and some of these ask for nothing.
LITTLE: dict[str, Any] = {"runs": 60, "pairs": 12, "envelope": Envelope((2, 2), ("ddim",), (1.0, 5.0))}


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
def recorded(eager: Any, small_training: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a training of a church and of ink."""
    folder = tmp_path_factory.mktemp("recorded")
    train(eager, WorldPrompts(["church", "ink"], load_split()), folder, steps=1, **LITTLE)
    return folder


def test_a_short_training_makes_a_module_that_loads(eager: Any, recorded: Path, tmp_path: Path) -> None:
    source = WorldPrompts(["church", "ink"], load_split())
    module = train(eager, source, tmp_path, steps=3, runs_from=recorded, pairs=12, batch_scale=2)
    branch = module.last_branch
    church, ink = branch.fallback[0]
    torch.testing.assert_close(church, encode(eager, ["a house"])[1][0])
    assert not ink.any()
    assert branch.keeps_subject.tolist() == [0, 1]
    loaded = SafetyModule.load(tmp_path / "safety")
    assert loaded.config == module.config
    assert loaded.state_dict().keys() == module.state_dict().keys()  # its norms are folded
    for name, tensor in module.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor.half().float())
    assert module.config.provenance["steps"] == 3
    assert torch.isfinite(torch.tensor(module.config.provenance["validation"]["loss"]))
    assert branch.centre.any()
    assert module.config.promise is None


def test_the_same_seed_trains_the_same_module_and_another_does_not(eager: Any, recorded: Path, tmp_path: Path) -> None:
    source = WorldPrompts(["ink"], load_split())
    made = [
        train(eager, source, tmp_path / str(index), seed=seed, steps=2, runs_from=recorded, pairs=12).sha256()
        for index, seed in enumerate((0, 0, 1))
    ]
    assert made[0] == made[1] != made[2]


def test_training_goes_on_from_another_module(eager: Any, recorded: Path, tmp_path: Path) -> None:
    source, start = WorldPrompts(["church", "ink"], load_split()), SafetyModule.load(recorded / "safety")
    module = train(eager, source, tmp_path, steps=1, runs_from=recorded, pairs=12, start=start)
    for name, tensor in start.state_dict().items():
        if "centre" not in name:
            torch.testing.assert_close(module.state_dict()[name], tensor, atol=1e-3, rtol=1e-3)
    assert module.config.provenance["started_from"] is not None


def test_training_on_a_users_pairs_resumes_and_draws_its_losses(eager: Any, tmp_path: Path) -> None:
    pairs = [{"unsafe": f"a castle {where}", "safe": f"a house {where}"} for where in ("on blue", "next to a cat")]
    (tmp_path / "pairs.json").write_text(json.dumps({"castle": pairs, "benign": ["a dog"]}))
    source, out = FilePrompts(tmp_path / "pairs.json"), tmp_path / "out"
    train(eager, source, out, steps=2, **LITTLE)
    recorded = {path: path.stat().st_mtime_ns for path in out.glob("runs_*.safetensors")}
    module = train(eager, source, out, steps=4, **LITTLE)
    assert len(recorded) == 5
    assert {path: path.stat().st_mtime_ns for path in out.glob("runs_*.safetensors")} == recorded
    rows = [row["step"] for row in csv.DictReader((out / "safety.csv").open())]
    assert rows == ["2", "4"]
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert module.config.concept_names == ["castle"]
    (out / "safety.ckpt").write_bytes((out / "safety.ckpt").read_bytes()[:1000])
    with pytest.raises(TrainingError, match=r"safety\.ckpt does not fit this run"):
        train(eager, source, out, steps=4, **LITTLE)


def test_recorded_runs_that_do_not_serve(eager: Any, recorded: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="are of church, ink; there are none of weapons"):
        train(eager, WorldPrompts(["weapons"], load_split()), tmp_path, steps=1, pairs=8, runs_from=recorded)
    with pytest.raises(TrainingError, match="holds no recorded runs, files called"):
        train(eager, WorldPrompts(["ink"], load_split()), tmp_path, steps=1, pairs=8, runs_from=tmp_path / "none")
    assert not (tmp_path / "safety").exists()


def test_runs_that_all_ask_for_something_are_too_few_to_centre_by() -> None:
    asks = small_bank(4, 2, "a", asked=torch.ones(8, 1))
    with pytest.raises(TrainingError, match="none of the 4 runs that are held out asks for nothing; record more"):
        _clean(asks, torch.arange(8))
    some = small_bank(4, 2, "a", asked=torch.tensor([[0.0], [0], [1], [0], [0], [0], [0], [0]]))
    assert _clean(some, torch.tensor([0, 1, 2, 3, 4, 5])).run.tolist() == [0, 0, 1, 1]


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
    module = small_module()
    assert module.sha256() == small_module().sha256()
    seen = {module.sha256()}
    for name in ("centre", "keeps_subject", "fallback_prompt"):
        getattr(module.last_branch, name).add_(1)
        seen.add(module.sha256())
    concepts = module.config.concepts
    module.config = structs.replace(module.config, concepts=(structs.replace(concepts[0], threshold=0.9), *concepts[1:]))
    seen.add(module.sha256())
    module.config = structs.replace(module.config, cooldown=7)
    seen.add(module.sha256())
    assert len(seen) == 6


def test_module_files_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"config\.json"):
        SafetyModule.load(tmp_path)
    module = small_module()
    module.config.save(tmp_path / "config.json")
    with pytest.raises(RequestError, match=r"model\.safetensors"):
        SafetyModule.load(tmp_path)
    module.save(tmp_path)
    weights = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights[:1000])
    with pytest.raises(RequestError, match=r"model\.safetensors"):
        SafetyModule.load(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(weights)
    structs.replace(module.config, features=24).save(tmp_path / "config.json")
    with pytest.raises(RequestError, match=r"is of shape \[.*\], expected \["):
        SafetyModule.load(tmp_path)
