"""Thresholds that promise: levels by hand, the bound by hand, and the promise on simulated pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs
from scipy.stats import binom
from small_module import CONCEPTS, firing, seen_at, small_module
from small_runs import small_bank
from torch import Tensor
from typer.testing import CliRunner

from saferedir.engines.errors import RequestError
from saferedir.engines.manifest import Envelope
from saferedir.runtime.command_line.app import app
from saferedir_torch.calibration import (
    RARE,
    RATE,
    Seen,
    allowed_exceedances,
    bound,
    calibrate,
    deciles,
    joint_rate,
    logit_of,
    set_centre,
    tail_level,
)
from saferedir_torch.command_line.benign_prompts import benign_prompts
from saferedir_torch.controller import Controller, Guided, State, amplification
from saferedir_torch.detector import KNOTS, bends
from saferedir_torch.models import SHIPPED_MODEL
from saferedir_torch.runs import RunBank
from saferedir_torch.safety_module import SafetyModule

ENVELOPE = Envelope((4, 10), ("ddim", "euler"), (1.0, 12.0))


def test_how_many_may_fire() -> None:
    assert allowed_exceedances(3000) == 0
    assert allowed_exceedances(2995) == 0
    assert allowed_exceedances(4742) == 0 + 1
    assert allowed_exceedances(10511, 0.000455) == 1
    with pytest.raises(RequestError, match="at least 2995"):
        allowed_exceedances(2994)


@given(pictures=st.integers(3000, 40_000))
@settings(max_examples=30, deadline=None)
def test_the_allowed_number_is_the_largest_that_keeps_the_promise(pictures: int) -> None:
    allowed = allowed_exceedances(pictures)
    assert binom.cdf(allowed, pictures, 0.001) <= 0.05 < binom.cdf(allowed + 1, pictures, 0.001)


def test_deciles_are_of_the_highest_score_of_each_picture() -> None:
    highest = np.linspace(-5, 5, 101)
    both = np.stack([highest, np.full(101, -5.0)], axis=1)
    np.testing.assert_allclose(deciles(both), 1 / (1 + np.exp(-np.arange(-4.0, 5))), atol=1e-8)


def test_one_bound_for_the_whole_picture() -> None:
    logits = np.array([[1.0, -9.0], [0.0, 2.5], [-3.0, -3.0]])
    assert logit_of(bound(logits, allowed=0)) == pytest.approx(2.501)
    assert logit_of(bound(logits, allowed=1)) == pytest.approx(1.001)


def test_the_promise_holds_as_often_as_it_says() -> None:
    """200 calibrations on pictures whose false alarm rate above any bound is known exactly."""
    rng = np.random.default_rng(0)
    kept = 0
    for _ in range(200):
        threshold = bound(rng.exponential(size=(3000, 1)), allowed_exceedances(3000))
        kept += np.exp(-logit_of(threshold)) <= 0.001
    assert 180 <= kept <= 200  # 95 % of 200 is 190, standard deviation 3


def test_a_level_is_reached_about_as_rarely_as_is_said() -> None:
    draw = torch.Generator().manual_seed(0)
    scale = torch.tensor([0.3, 1.0, 4.0])
    reached = torch.empty(4000, 3).exponential_(generator=draw) * scale - 7
    often = (torch.empty(2_000_000, 3).exponential_(generator=draw) * scale - 7 >= tail_level(reached)).float().mean(dim=0)
    assert (often > RARE / 8).all()
    assert (often < 8 * RARE).all()


def test_the_joint_rate_holds_as_often_as_it_says() -> None:
    """Scores of a concept before and one added, independent and uniform; the former fires at a rate of its own."""
    rng, pictures, own = np.random.default_rng(5), 800, 0.002
    kept = []
    for _ in range(600):
        before, added = rng.random(pictures) < own, rng.random(pictures)
        exceeds = 1 - added[~before].max()  # at the highest score of those that are not spoilt already
        kept.append(own + (1 - own) * exceeds <= joint_rate(int(before.sum()), pictures))
    assert np.mean(kept) > 0.95


@torch.no_grad()
def test_what_calibration_looks_at_is_what_the_controller_sees() -> None:
    """Step by step: estimates within bounds, none in the first step, and guidance that amplifies."""
    module, bank = small_module(), small_bank(6, 4)
    bank.guidance = torch.tensor([1.0, 5.0, 7.5, 10.0, 12.0, 3.0]).repeat_interleave(4)
    bank.denoised = 9 * bank.denoised
    statistic = Seen(module, bank).statistic(module)
    for row in range(len(bank.run)):
        prompt, negative = (bank.prompts[index[row]][None].float() for index in (bank.prompt, bank.negative))
        denoised = None if bank.first[row] else bank.denoised[row][None].float()
        seen = seen_at(bank.latent[row][None].float(), float(bank.share[row]), denoised)
        guided = Guided(negative, torch.tensor([amplification(float(bank.guidance[row]))]))
        state, policy = State.initial(prompt, CONCEPTS), firing(torch.zeros(1, CONCEPTS, dtype=torch.bool))
        _, verdict = Controller(module)(seen, prompt, guided, state, policy)
        torch.testing.assert_close(verdict.score[0], torch.sigmoid(statistic[row]), rtol=1e-4, atol=1e-4)


def levels_by_hand(seen: Seen, answer: Tensor, known: Tensor) -> list[Tensor | None]:
    """Of each knot, by the steps within a knot's distance; None where there are none."""
    found: list[Tensor | None] = []
    for knot in range(KNOTS + 1):
        near = ((seen.bank.share - knot / KNOTS).abs() <= 1 / KNOTS) & known
        runs = [answer[near & (seen.bank.run == run)] for run in range(int(seen.bank.run.max()) + 1)]
        found.append(tail_level(torch.stack([own.amax(dim=0) for own in runs])) if near.any() else None)
    return found


@torch.no_grad()
def test_levels_are_read_off_the_tail_at_every_knot_and_moved_alike() -> None:
    module, bank = small_module(), small_bank(60, KNOTS + 1)
    bank.share = torch.linspace(1, 0, KNOTS + 1).repeat(60)
    seen = Seen(module, bank)
    set_centre(module, seen)
    levels = module.last_branch.levels(bends(torch.arange(KNOTS + 1) / KNOTS))
    by_hand = [levels_by_hand(seen, answer, known) for answer, known in ((seen.told, bank.run >= 0), (seen.shown, ~bank.first))]
    expected = torch.cat([torch.stack([one for one in answer if one is not None]) for answer in by_hand], dim=1)
    moved = levels - expected
    torch.testing.assert_close(moved, moved[:1, :CONCEPTS].repeat(KNOTS + 1, 2), atol=0.05, rtol=0)  # fp16 on disk
    highest = torch.quantile(seen.highest(seen.statistic(module)), 1 - RATE, dim=0)
    torch.testing.assert_close(highest, torch.zeros(CONCEPTS), atol=0.05, rtol=0)
    assert torch.equal(module.last_branch.centre, module.last_branch.centre.half().float())


@torch.no_grad()
def test_where_nothing_was_drawn_levels_are_those_of_the_nearest_knots() -> None:
    module, bank = small_module(), small_bank(40, 3)
    bank.share = torch.tensor([0.6, 0.5, 0.45]).repeat(40)
    set_centre(module, Seen(module, bank))
    levels = module.last_branch.levels(bends(torch.arange(KNOTS + 1) / KNOTS))
    told, shown = levels[:, :CONCEPTS], levels[:, CONCEPTS:]
    for answer, lowest, highest in ((told, 4, 6), (shown, 4, 5)):  # the first step shows nothing yet
        torch.testing.assert_close(answer[: lowest + 1], answer[lowest].expand(lowest + 1, -1), atol=0.05, rtol=0)
        torch.testing.assert_close(answer[highest:], answer[highest].expand(KNOTS + 1 - highest, -1), atol=0.05, rtol=0)
    assert (told[4] - told[6]).abs().max() > 0.1


def test_pictures_in_which_nothing_was_known_yet_are_too_few_to_centre_by() -> None:
    module = small_module()
    with pytest.raises(RequestError, match="10 benign pictures are too few to centre by"):
        set_centre(module, Seen(module, small_bank(10, 1)))


def highest(module: SafetyModule, bank: RunBank) -> Tensor:
    """Of each run."""
    seen = Seen(module, bank)
    return seen.highest(seen.statistic(module))


@pytest.mark.parametrize(("pictures", "allowed"), [(299, 0), (473, 1)])
def test_calibration_promises_what_its_pictures_bear_out(pictures: int, allowed: int) -> None:
    module, centring, runs = small_module(), small_bank(50, 2), small_bank(pictures, 2)
    promise = calibrate(module, centring, runs, envelope=ENVELOPE, prompts="noise", rate=0.01)
    assert (promise.rate, promise.pictures, promise.allowed, promise.envelope) == (0.01, pictures, allowed, ENVELOPE)
    assert module.config.promise == promise
    (threshold,) = {concept.threshold for concept in module.config.concepts}
    reached = (highest(module, runs) >= logit_of(threshold)).any(dim=1)
    assert int(reached.sum()) == allowed
    nearest = highest(module, runs).amax(dim=1).sort(descending=True).values[allowed]
    assert 0 < logit_of(threshold) - float(nearest) < 0.01
    assert "at most 1 % of benign pictures" in str(promise)
    assert "4 to 10 steps of ddim, euler, guidance 1 to 12" in str(promise)


def test_too_few_pictures_carry_no_promise() -> None:
    module = small_module()
    with pytest.raises(RequestError, match=r"^298 benign pictures cannot promise 1 %.*at least 299 are needed$"):
        calibrate(module, small_bank(50, 2), small_bank(298, 2), envelope=ENVELOPE, prompts="noise", rate=0.01)
    assert module.config.promise is None


def test_calibrating_an_addition_leaves_the_others_as_they_were() -> None:
    module = small_module(branches=(2, 1))
    deaf = [structs.replace(concept, threshold=1 - 1e-10) for concept in module.config.concepts[:2]]
    module.config = structs.replace(module.config, concepts=(*deaf, module.config.concepts[2]))
    before = {name: value.clone() for name, value in module.state_dict().items()}
    centring, runs = small_bank(50, 2), small_bank(299, 2)
    calibrate(module, centring, runs, envelope=ENVELOPE, prompts="noise", rate=0.01)
    assert module.config.concepts[:2] == tuple(deaf)
    changed = {name for name, value in module.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"branches.1.centre"}
    nearest = float(highest(module, runs)[:, 2].max())
    assert 0 < logit_of(module.config.concepts[2].threshold) - nearest < 0.01
    eager = tuple(structs.replace(concept, threshold=1e-6) for concept in deaf)
    module.config = structs.replace(module.config, concepts=eager + module.config.concepts[2:])
    with pytest.raises(RequestError, match="a, b fire on 299 of 299 pictures; calibrate the module"):
        calibrate(module, centring, runs, envelope=ENVELOPE, prompts="noise", rate=0.01)


def test_where_those_before_fire_already_the_promise_is_what_holds_for_both(monkeypatch: pytest.MonkeyPatch) -> None:
    module, pictures = small_module(branches=(2, 1)), 2995
    reached = torch.full((pictures, 3), -5.0)
    reached[:, 2] = torch.linspace(-4, 3, pictures)
    reached[7, 0] = reached[7, 2] = 12.0  # the first one's own, and the new one may fire there as well
    monkeypatch.setattr("saferedir_torch.calibration.set_centre", lambda *_: None)
    monkeypatch.setattr(Seen, "highest", lambda *_: reached)
    bank = small_bank(2, 1)
    bank.run = torch.tensor([0, pictures - 1])
    promise = calibrate(module, bank, bank, envelope=ENVELOPE, prompts="none")
    assert (promise.allowed, promise.rate) == (1, round(joint_rate(1, pictures), 6))
    assert 0.003 < promise.rate < 0.0033
    assert logit_of(module.config.concepts[-1].threshold) == pytest.approx(3.0, abs=0.01)
    reached[7] = -5.0
    promise = calibrate(module, bank, bank, envelope=ENVELOPE, prompts="none", rate=0.002)
    assert (promise.allowed, promise.rate) == (allowed_exceedances(pictures, 0.002), 0.002)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--steps", "few"], "'few' is no range, such as 4-50"),
        (["--steps", "4.5-9"], "'4.5-9' is no range"),
        (["--steps", "50-4"], "steps goes from 50 to 4"),
        (["--steps", "0-4"], "Expected `int` >= 1"),
        (["--guidance", "nan"], "Expected `float` >= 0"),
        (["--guidance", "7-5"], "guidance_scale goes from 7 to 5"),
        (["--sampler", "ddim", "--sampler", "magic"], "magic is not known; expected some of ddim, euler"),
    ],
)
def test_an_envelope_that_cannot_be_is_refused_before_anything_is_drawn(options: list[str], said: str, tmp_path: Path) -> None:
    usual = ["calibrate", "--model", str(SHIPPED_MODEL), "--safety", str(tmp_path), "--recorded", str(tmp_path / "benign")]
    result = CliRunner().invoke(app, [*usual, *options], env={"COLUMNS": "300"})
    assert result.exit_code == 2
    assert said in result.output
    assert not any(tmp_path.iterdir())


def test_no_prompts_are_an_error_that_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "none.txt").write_text("\n \n")
    with pytest.raises(RequestError, match=r"none\.txt holds no prompt;"):
        benign_prompts(tmp_path / "none.txt", 3, 0, [])
    with pytest.raises(RequestError, match="at least one"):
        benign_prompts(None, 0, 0, [])
