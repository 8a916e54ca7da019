"""What a step of training learns from: batches by their number alone, labels, and latents carried back to a noisier level."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from small_module import CONCEPTS, TOKENS, WIDTH, small_module
from small_runs import small_bank
from torch import Tensor

from saferedir_torch.detector import Step
from saferedir_torch.learner import (
    LITTLE,
    MUCH,
    OWN_SHARE,
    PAIRED_SHARE,
    PARTIAL_SHARE,
    SHORTEST_WAY,
    TARGET_SHARE,
    Cases,
    Learner,
    _level,
    _partial,
    _rows,
)  # fmt: skip
from saferedir_torch.pairs import PairBank
from saferedir_torch.runs import RunBank
from saferedir_torch.safety_module import StepFeatures

RUNS, STEPS, PAIRS = 40, 4, 90


def pair_bank() -> PairBank:
    """Each third pair asks for nothing, each third for a and b of which a is replaced, each third for c, which is replaced."""
    draw = torch.Generator().manual_seed(4)
    original, target = torch.randn(2, PAIRS, TOKENS, WIDTH, generator=draw).half()
    asked = torch.tensor([[0.0, 0, 0], [1, 1, 0], [0, 0, 1]]).repeat(PAIRS // 3, 1)
    replaced = torch.tensor([[0.0, 0, 0], [1, 0, 0], [0, 0, 1]]).repeat(PAIRS // 3, 1)
    return PairBank(original, target, asked, replaced, torch.ones(PAIRS, TOKENS, dtype=torch.bool))


def run_bank() -> RunBank:
    labels = torch.randint(-1, 2, (RUNS * STEPS, CONCEPTS), generator=torch.Generator().manual_seed(5)).float()
    return small_bank(RUNS, STEPS, "abc", asked=labels.clamp(min=0), shown=labels)


@pytest.fixture
def learner(small_training: None) -> Learner:
    return Learner(small_module(), run_bank(), pair_bank(), seed=0)


def test_a_batch_depends_on_the_number_of_its_step_alone(learner: Learner) -> None:
    first, again, other = (learner.loss_of_step(step) for step in (3, 3, 4))
    assert torch.equal(first[0], again[0])
    assert first[1] == again[1]
    assert not torch.equal(first[0], other[0])
    assert learner.validate() == learner.validate()


def test_runs_and_pairs_that_are_held_out_are_never_learnt_from(learner: Learner) -> None:
    trained, held = (set(learner.bank.run[rows].tolist()) for rows in (learner.train_rows, learner.held_rows))
    assert not trained & held
    assert (len(trained), len(held)) == (36, 4)
    assert not set(learner.train_pairs.tolist()) & set(learner.held_pairs.tolist())
    assert set(learner.changing_pairs.tolist()) | set(learner.untouched_pairs.tolist()) == set(learner.train_pairs.tolist())
    assert not learner.pairs.replaced[learner.untouched_pairs].any()
    assert learner.pairs.replaced[learner.changing_pairs].any(dim=1).all()


def kinds(learner: Learner, size: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of the cases drawn by a seed: which pair, and how each case came to be, as shares of 1."""
    rng = np.random.default_rng(seed)
    other, _ = (learner._any_of(pool, size, rng) for pool in (learner.held_pairs, learner.untouched_pairs))
    kind = torch.from_numpy(rng.random(size))
    return other, kind, torch.from_numpy(rng.uniform(0.1, 1.0, size))


def test_cases_are_labelled_by_what_their_prompt_asks_for(learner: Learner) -> None:
    size, seed = 400, 9
    rows = learner._any_of(learner.held_rows, size, np.random.default_rng(1))
    cases = learner._cases(rows, np.random.default_rng(seed), None)  # without noise
    other, kind, way = kinds(learner, size, seed)
    own, paired = kind < OWN_SHARE, (kind >= OWN_SHARE) & (kind < OWN_SHARE + PAIRED_SHARE)
    redirected = (kind >= OWN_SHARE + PAIRED_SHARE) & (kind < OWN_SHARE + PAIRED_SHARE + TARGET_SHARE)
    moving = kind >= OWN_SHARE + PAIRED_SHARE + TARGET_SHARE
    assert all(flags.sum() > 20 for flags in (own, paired, redirected, moving))
    asked, replaced = learner.pairs.asked[other], learner.pairs.replaced[other]
    assert torch.equal(cases.asked[own], learner.bank.asked[rows][own])
    assert torch.equal(cases.asked[paired], asked[paired])
    assert torch.equal(cases.asked[redirected], (asked - replaced)[redirected])
    # On its way a prompt asks for nothing at first, for its concept in the end, and between that is open; what is not replaced
    # it asks for all along.
    far, near = moving & (way >= MUCH), moving & (way * 2.4 <= LITTLE)
    assert torch.equal(cases.asked[far], asked[far])
    assert torch.equal(cases.asked[near], (asked - replaced)[near])
    assert torch.equal(cases.asked[moving][replaced[moving] == 0], asked[moving][replaced[moving] == 0])
    assert (cases.asked[moving] == -1).any()
    # Words are what they are, whatever guidance makes of them.
    little, between = moving & (way <= LITTLE), moving & (way > LITTLE) & (way < MUCH)
    assert torch.equal(cases.named[~moving], cases.asked[~moving])
    assert torch.equal(cases.named[little], (asked - replaced)[little])
    assert (cases.named[between][replaced[between] > 0] == -1).all()
    assert not torch.equal(cases.named[moving], cases.asked[moving])
    assert torch.equal(cases.shown, learner.bank.shown[rows])
    assert torch.equal(cases.run_asked, learner.bank.asked[rows])
    assert torch.equal(cases.unknown, paired[:, None] & (replaced > asked))


def test_known_words_settle_it_and_of_others_the_picture_tells() -> None:
    nothing = torch.zeros(0)
    asked = torch.tensor([[1.0, 1, 1, 0, 0, 0, -1, -1, -1]])
    shown = torch.tensor([[1.0, 0, -1, 1, 0, -1, 1, 0, -1]])
    for known, sure, told in (
        (True, [1, 1, 1, 1, 1, 1, 1, 0, 0], [1, 1, 1, 0, 0, 0, 1]),
        (False, [1, 1, 1, 1, 1, 0, 1, 0, 0], [1, 1, 1, 1, 0, 1]),
    ):
        unknown = torch.full_like(asked, not known, dtype=torch.bool)
        labels, weights = Cases(
            Step(nothing, nothing, nothing), nothing, nothing, asked, asked, shown, nothing, unknown, nothing
        ).told
        assert weights.tolist() == [sure]
        assert labels[weights > 0].tolist() == told


def test_half_of_the_pictures_are_seen_in_a_mirror_with_what_is_known_of_them(learner: Learner) -> None:
    rows = torch.arange(RUNS * STEPS)
    plain = learner._steps(rows)
    seen = learner._steps(rows, np.random.default_rng(4), torch.Generator().manual_seed(5))
    same, mirrored = (
        torch.tensor([torch.equal(one, other) for one, other in zip(own, seen.estimate, strict=True)])
        for own in (plain.estimate, plain.estimate.flip(3))
    )
    assert 0.3 < float(same.float().mean()) < 0.6
    assert 0.3 < float(mirrored.float().mean()) < 0.6
    as_they_were = torch.tensor([torch.equal(one, other) for one, other in zip(plain.latent, seen.latent, strict=True)])
    assert not (as_they_were & mirrored & ~same).any()


def test_what_the_redirector_is_told_is_active(learner: Learner) -> None:
    chosen = torch.arange(PAIRS).repeat(20)
    active, asked, replaced = (learner._active(chosen, np.random.default_rng(2)), learner.pairs.asked[chosen],
                               learner.pairs.replaced[chosen])  # fmt: skip
    assert active.any(dim=1).all()
    assert (active[replaced > 0] == 1).all()
    asks = asked.any(dim=1)
    assert (active[asks][(asked > replaced)[asks]] == 0).all()  # what it asks for and is to keep
    falsely = active[asks][asked[asks] == 0]
    assert 0.1 < float(falsely.mean()) < 0.3


def test_a_quarter_of_the_prompts_to_be_moved_are_part_of_the_way() -> None:
    unsafe, target = torch.ones(4000, 1, 1), torch.zeros(4000, 1, 1)
    way = _partial(unsafe, target, np.random.default_rng(0)).flatten()
    partial = way[way < 1]
    assert abs(len(partial) / len(way) - PARTIAL_SHARE) < 0.03
    assert partial.min() >= SHORTEST_WAY
    assert abs(float(partial.mean()) - (1 + SHORTEST_WAY) / 2) < 0.03


def test_latents_are_carried_back_by_the_forward_process(learner: Learner) -> None:
    bank = learner.bank
    picture = torch.randn(RUNS, 4, 8, 8, generator=torch.Generator().manual_seed(6))
    last = learner.last_row
    alpha, sigma = _level(bank.share[last])
    assert torch.equal(last, torch.arange(RUNS) * STEPS + STEPS - 1)
    bank.latent[last] = (alpha[:, None, None, None] * picture).half()  # but for its noise, which is added below
    noise = torch.randn(picture.shape, generator=torch.Generator().manual_seed(7))
    bank.latent[last] += (sigma[:, None, None, None] * noise).half()
    found = learner._renoised(torch.arange(RUNS * STEPS), torch.Generator().manual_seed(8))
    torch.testing.assert_close(found[last], bank.latent[last].float(), atol=1e-2, rtol=1e-2)  # its own level
    alpha, sigma = _level(bank.share)
    rest = found - alpha[:, None, None, None] * picture.repeat_interleave(STEPS, dim=0)
    for step in range(STEPS):
        rows = torch.arange(RUNS) * STEPS + step
        assert float(rest[rows].std()) == pytest.approx(float(sigma[rows[0]]), rel=0.05)


def test_of_features_that_come_twice_both_halves_are_taken() -> None:
    every = StepFeatures(torch.arange(10.0)[:, None], torch.arange(5.0)[:, None])
    assert _rows(every, 1, 3).joint[:, 0].tolist() == [1, 2, 3, 6, 7, 8]
    assert _rows(every, 1, 3).bends[:, 0].tolist() == [1, 2, 3]


def test_an_open_label_teaches_nothing(learner: Learner) -> None:
    rows = learner._any_of(learner.held_rows, 60, np.random.default_rng(1))
    cases = learner._cases(rows, np.random.default_rng(3), None)
    step = learner.module.features(cases.step)
    unknown, nothing = torch.full_like(cases.asked, -1.0), torch.zeros_like(cases.asked)
    hidden = cases._replace(asked=unknown, named=unknown, shown=unknown, run_asked=nothing)
    loss, parts = learner._detection(hidden, step)
    assert float(loss.detach()) == 0
    assert parts["told"] == parts["shown"] == parts["words"] == 0
    told, _ = learner._detection(cases, step)
    assert float(told.detach()) > 0.1
