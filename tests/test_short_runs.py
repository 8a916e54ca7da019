"""Short runs are recorded in parts, and teach what a step shows without the prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from saferedir_torch import short_runs as recording
from saferedir_torch.models import load_pipeline
from saferedir_torch.short_runs import recorded_short_runs, short_runs
from saferedir_torch.train import train
from saferedir_torch.world.source import WorldPrompts
from saferedir_torch.world.split import load_split

pytestmark = pytest.mark.usefixtures("small_training")


@pytest.fixture(scope="module")
def eager() -> Any:
    return load_pipeline()


@pytest.fixture
def source(monkeypatch: pytest.MonkeyPatch) -> WorldPrompts:
    monkeypatch.setattr(recording, "PART", 4)
    monkeypatch.setattr(recording, "SHORT_SAMPLINGS", ((3, 5.0),))
    return WorldPrompts(["church"], load_split())


def test_a_stopped_recording_goes_on_with_the_next_part(eager: Any, source: WorldPrompts, tmp_path: Path) -> None:
    (first,) = short_runs(eager, source, tmp_path, count=4, seed=0)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    again, second = short_runs(eager, source, tmp_path, count=6, seed=0)
    assert all(path.stat().st_mtime_ns == when for path, when in before.items())
    assert torch.equal(again.latent, first.latent)
    assert not torch.equal(second.latent[:3], first.latent[:3])
    assert int(second.run.max()) < int(first.run.max())  # two more unsafe runs, not four
    assert [len(part.run) for part in recorded_short_runs(tmp_path)] == [len(first.run), len(second.run)]
    assert not recorded_short_runs(tmp_path / "none")


def test_they_teach_the_score_without_the_prompt_and_nothing_else(eager: Any, source: WorldPrompts, tmp_path: Path) -> None:
    options: dict[str, Any] = {"runs": 4, "pairs": 12, "samplings": [(3, 5.0)], "steps": 1}
    without = train(eager, source, tmp_path / "without", **options)
    taught = train(eager, source, tmp_path / "with", short=4, **options)
    used = train(eager, source, tmp_path / "used", runs_from=tmp_path / "with", **options)
    changed = [name for name, value in taught.state_dict().items() if not torch.equal(value, without.state_dict()[name])]
    assert changed
    assert all(".alone" in name for name in changed)
    assert taught.sha256() == used.sha256()
    assert taught.config.provenance["short_runs"] == 4
