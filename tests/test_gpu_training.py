"""Training on a GPU, `make test-gpu`: a step or two of everything, since what lies on which device shows nowhere else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from saferedir.engines.manifest import Envelope
from saferedir_torch.models import load_pipeline
from saferedir_torch.new_module import new_module
from saferedir_torch.peers.published import PublishedSafeRedir
from saferedir_torch.train import train
from saferedir_torch.world.architectures import ARCHITECTURES, make
from saferedir_torch.world.source import WorldPrompts
from saferedir_torch.world.split import load_split

pytestmark = pytest.mark.gpu
LITTLE: dict[str, Any] = {"runs": 96, "pairs": 8, "steps": 1, "envelope": Envelope((2, 2), ("ddim", "dpm++-2m"), (1.0, 5.0))}


@pytest.mark.parametrize("kind", sorted(ARCHITECTURES))
def test_a_model_is_made_and_a_module_refitted_to_it(kind: str, tmp_path: Path) -> None:
    pipeline = load_pipeline(make(kind, tmp_path, steps=1, part_steps=1, size=8, device="cuda")).to("cuda")
    source = WorldPrompts(["church", "ink", "weapons"], load_split())
    start = new_module(load_pipeline(), source, 0)
    module = train(pipeline, source, tmp_path, start=start, **LITTLE)
    assert next(module.parameters()).device.type == "cuda"
    assert all(torch.isfinite(value).all() for value in module.state_dict().values())


def test_the_published_network_is_trained_and_draws(tmp_path: Path) -> None:
    from benchmarks.tables.ablation import Lessons, train_published

    pipeline, split = load_pipeline().to("cuda"), load_split()
    train(pipeline, WorldPrompts(["church"], split), tmp_path, **LITTLE)
    network = train_published(Lessons.untaught(pipeline, "church", split, tmp_path, tmp_path / "published", steps=1))
    assert PublishedSafeRedir(pipeline, network, steps=2).draw(["a church"], [3]).shape == (1, 64, 64, 3)
