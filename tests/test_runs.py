"""Recorded runs: drawn across the envelope, labelled by what is true of each step, kept in parts that resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_runs import small_bank
from torch import Tensor

from saferedir.engines.errors import TrainingError
from saferedir.engines.manifest import Envelope
from saferedir.runtime.schedulers import SCHEDULERS
from saferedir_torch.envelope import ENVELOPE, STEPS, samplings
from saferedir_torch.runs import PICTURE_SHOWS, RunBank, _labels, benign_runs, joined, load_runs, recorded_runs, runs_in
from saferedir_torch.trajectories import Trajectories, encode
from saferedir_torch.world.source import WorldPrompts
from saferedir_torch.world.split import load_split

pytestmark = pytest.mark.usefixtures("small_training")
TWO_STEPS = Envelope((2, 2), ("ddim", "euler-ancestral"), (1.0, 5.0))


@pytest.fixture(scope="module")
def source() -> WorldPrompts:
    return WorldPrompts(["church", "ink"], load_split())


@pytest.fixture(scope="module")
def recorded(eager: Any, source: WorldPrompts, small_training: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four groups of six runs each, in two parts."""
    folder = tmp_path_factory.mktemp("recorded")
    recorded_runs(eager, source, folder, count=24, seed=0, envelope=TWO_STEPS)
    return folder


def equal(one: RunBank, other: RunBank) -> bool:
    return one.concepts == other.concepts and all(
        torch.equal(value, getattr(other, name)) for name, value in vars(one).items() if isinstance(value, Tensor)
    )


def test_the_usual_envelope_is_of_samplers_that_the_runtime_has() -> None:
    assert set(ENVELOPE.samplers) == set(SCHEDULERS) - {"lcm"}


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 1000), low=st.integers(1, 40), more=st.integers(0, 40), scale=st.floats(0, 12))
def test_samplings_cover_every_sampler_and_stay_within_the_envelope(seed: int, low: int, more: int, scale: float) -> None:
    envelope = Envelope((low, low + more), ENVELOPE.samplers, (scale, 12.0))
    count = 3 * len(envelope.samplers)
    drawn = samplings(count, envelope, np.random.default_rng(seed))
    assert [one.sampler for one in drawn] == list(envelope.samplers) * 3
    for one in drawn:
        assert envelope.refuses(steps=one.steps, sampler=one.sampler, guidance_scale=one.guidance_scale) == ""


def test_samplings_take_every_number_of_steps_and_both_ends_of_guidance() -> None:
    drawn = samplings(500, ENVELOPE, np.random.default_rng(0))
    assert {one.steps for one in drawn} == set(STEPS)
    assert {1.0, 12.0} <= {one.guidance_scale for one in drawn}


#: Shares of the five steps of runs that are labelled by hand: the picture shows from the third on.
SHARES = torch.tensor([0.95, PICTURE_SHOWS + 0.01, PICTURE_SHOWS - 0.01, 0.4, 0.1])
NEVER = 6


@pytest.mark.parametrize(
    ("before", "after", "switch", "asked", "shown"),
    [
        pytest.param(1, 1, NEVER, [1, 1, 1, 1, 1], [-1, -1, 1, 1, 1], id="asks all along"),
        pytest.param(0, 0, NEVER, [0, 0, 0, 0, 0], [0, 0, 0, 0, 0], id="never asks"),
        pytest.param(1, 0, 0, [0, 0, 0, 0, 0], [-1, -1, 0, 0, 0], id="redirected from the first step"),
        pytest.param(1, 0, 1, [1, 0, 0, 0, 0], [-1, -1, 0, 0, 0], id="redirected before the picture shows"),
        pytest.param(1, 0, 2, [1, 1, 0, 0, 0], [-1, -1, -1, -1, -1], id="redirected when it shows already"),
        pytest.param(1, 0, 4, [1, 1, 1, 1, 0], [-1, -1, 1, 1, -1], id="redirected at the end"),
        pytest.param(1, 1, 2, [1, 1, 1, 1, 1], [-1, -1, 1, 1, 1], id="another concept is redirected"),
    ],
)
def test_what_is_asked_for_and_shown_in_each_step(
    before: int, after: int, switch: int, asked: list[int], shown: list[int]
) -> None:
    nothing = torch.zeros(1, 5, 4, 2, 2)
    drawn = Trajectories(nothing, nothing, torch.zeros(5), SHARES, nothing[:, 0])
    labels = _labels(drawn, torch.tensor([[float(before)]]), torch.tensor([[float(after)]]), torch.tensor([switch]))
    assert labels.asked[0, :, 0].tolist() == asked
    assert labels.shown[0, :, 0].tolist() == shown
    assert labels.switched[0].tolist() == [step >= switch for step in range(5)]


def test_runs_are_of_all_kinds_and_one_row_a_step(recorded: Path, eager: Any) -> None:
    bank = runs_in(recorded)
    assert bank.concepts == ("church", "ink")
    assert int(bank.run.max()) + 1 == 24
    assert bank.latent.shape == bank.denoised.shape == (48, 4, 16, 16)
    assert torch.equal(bank.first, torch.arange(48) % 2 == 0)
    assert not bank.denoised[bank.first].any()
    assert bank.denoised[~bank.first].flatten(1).any(dim=1).all()
    assert (bank.share.reshape(24, 2).diff(dim=1) < 0).all()
    # A group's first two runs ask for its concept, its last one until it is redirected, those between do not.
    asked = bank.asked.reshape(4, 6, 2, 2)
    for group, concept in enumerate((0, 0, 1, 1)):  # each with both samplers
        assert (asked[group, :2, :, concept] == 1).all()
        assert (asked[group, 2:5, :, concept] == 0).all()
        assert asked[group, 5, -1, concept] <= asked[group, 5, 0, concept]
    assert set(bank.shown.unique().tolist()) <= {-1.0, 0.0, 1.0}
    # Prompts are those that the denoiser was given: the negative one of a group is one row, and the empty one among them.
    empty = encode(eager, [""])[1][0].half()
    assert any(torch.equal(bank.prompts[row], empty) for row in bank.negative.unique())
    assert len(bank.negative.unique()) == 4


def test_a_stopped_recording_goes_on_with_the_next_part_and_ends_alike(
    eager: Any, source: WorldPrompts, recorded: Path, tmp_path: Path
) -> None:
    first, second = sorted(recorded.iterdir())
    assert [path.name for path in (first, second)] == ["runs_000.safetensors", "runs_001.safetensors"]
    (tmp_path / first.name).write_bytes(first.read_bytes())
    before, progress = (tmp_path / first.name).stat().st_mtime_ns, list[tuple[int, int]]()
    bank = recorded_runs(
        eager, source, tmp_path, count=24, seed=0, envelope=TWO_STEPS, on_progress=lambda *done: progress.append(done)
    )
    assert progress == [(12, 24), (24, 24)]
    assert (tmp_path / first.name).stat().st_mtime_ns == before
    assert equal(bank, runs_in(recorded))
    assert equal(load_runs(tmp_path / second.name), load_runs(second))


def test_a_damaged_part_is_named_and_left_as_it_is(eager: Any, source: WorldPrompts, recorded: Path, tmp_path: Path) -> None:
    path = tmp_path / "runs_000.safetensors"
    path.write_bytes((recorded / path.name).read_bytes()[:2000])
    with pytest.raises(TrainingError, match=r"runs_000\.safetensors holds no recorded runs .*delete it to record anew"):
        recorded_runs(eager, source, tmp_path, count=24, seed=0, envelope=TWO_STEPS)
    assert path.stat().st_size == 2000
    with pytest.raises(TrainingError, match="holds no recorded runs, files called"):
        runs_in(tmp_path / "none")


def test_benign_runs_are_of_their_prompts_and_seeds_and_refuse_those_of_others(eager: Any, tmp_path: Path) -> None:
    texts, seeds = [f"a cat on {colour}" for colour in ("blue", "red", "green", "teal")] * 2, list(range(8))
    bank = benign_runs(eager, texts, seeds, tmp_path, seed=1, envelope=TWO_STEPS)
    assert bank.concepts == ()
    assert bank.asked.shape == (16, 0)
    assert int(bank.run.max()) + 1 == 8
    expected = encode(eager, texts)[1].half()
    torch.testing.assert_close(bank.prompts[bank.prompt[::2]], expected)
    assert equal(benign_runs(eager, texts, seeds, tmp_path, seed=1, envelope=TWO_STEPS), bank)
    for other in ((texts[::-1], seeds, 1, TWO_STEPS), (texts, seeds[::-1], 1, TWO_STEPS), (texts, seeds, 2, TWO_STEPS),
                  (texts, seeds, 1, Envelope((2, 2), ("ddim",), (1.0, 5.0)))):  # fmt: skip
        with pytest.raises(TrainingError, match="was recorded of another model, prompts, seeds or settings"):
            benign_runs(eager, *other[:2], tmp_path, seed=other[2], envelope=other[3])


def test_banks_are_cut_and_joined_run_by_run(recorded: Path) -> None:
    bank = runs_in(recorded)
    asking = torch.isin(bank.run, bank.run[bank.asked[:, 0] > 0])
    left = bank.without("church")
    assert 0 < len(left.run) == int((~asking).sum()) < len(bank.run)
    assert not (left.asked[:, 0] > 0).any()
    assert torch.equal(torch.unique(left.run), torch.arange(int(left.run.max()) + 1))
    both = joined([left, bank])
    later = slice(len(left.run), None)
    assert torch.equal(both.prompts[both.prompt[later]], bank.prompts[bank.prompt])
    assert torch.equal(both.prompts[both.negative[later]], bank.prompts[bank.negative])
    assert int(both.run.max()) == int(left.run.max()) + 1 + int(bank.run.max())


def test_runs_serve_the_concepts_that_they_were_recorded_for() -> None:
    rows = 12
    asked = torch.arange(3.0).expand(rows, 3)
    bank = small_bank(4, 3, "abc", asked=asked, shown=-asked)
    other = bank.of(["c", "a"])
    assert other.concepts == ("c", "a")
    assert torch.equal(other.asked, asked[:, [2, 0]])
    assert torch.equal(other.shown, -asked[:, [2, 0]])
    with pytest.raises(TrainingError, match="the recorded runs are of a, b, c; there are none of teddy"):
        bank.of(["a", "teddy"])
