"""Labels of recorded runs by what they came to show, where prompts tell it wrongly."""

from __future__ import annotations

import torch

from saferedir_torch.training_data import LatentBank
from saferedir_torch.what_was_drawn import telling_rows, with_what_was_drawn

#: Of every run: a step in which nothing shows yet, one in which something does, and two by which it is told what.
TIMES = torch.tensor([901.0, 601.0, 401.0, 201.0])
OPEN = -1.0


def bank_of(asked: list[float], shown: list[list[float]], switched: list[bool]) -> LatentBank:
    runs, steps = len(asked), len(TIMES)
    first = torch.arange(runs)
    later = torch.where(torch.tensor(switched), first + runs, first)
    return LatentBank(
        concepts=("church",),
        latent=torch.zeros(runs * steps, 4, 2, 2),
        timestep=TIMES.repeat(runs),
        prompt=torch.stack([first, first, later, later], dim=1).flatten(),
        prompts=torch.zeros(2 * runs, 3, 5),
        asked=torch.tensor(asked)[:, None].repeat(1, steps).flatten()[:, None],
        shown=torch.tensor(shown).flatten()[:, None],
        run=first.repeat_interleave(steps),
    )


def corrected(bank: LatentBank, probabilities: list[float]) -> list[list[float]]:
    rows = telling_rows(bank)
    seen = torch.tensor(probabilities)[bank.run[rows]][:, None]
    labels: list[list[float]] = with_what_was_drawn(bank, rows, seen).shown.view(-1, len(TIMES)).tolist()
    return labels


def test_only_the_last_steps_tell_what_a_run_came_to_show() -> None:
    bank = bank_of([1.0, 0.0], [[OPEN, 1, 1, 1], [0, 0, 0, 0]], [False, False])
    assert telling_rows(bank).tolist() == [2, 3, 6, 7]


def test_labels_that_are_right_stay() -> None:
    labels = [[OPEN, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]]
    assert corrected(bank_of([1.0, 0.0], labels, [False, False]), [0.95, 0.01]) == labels


def test_a_prompt_that_asks_in_vain_shows_nothing_from_the_first_step() -> None:
    bank = bank_of([1.0], [[OPEN, 1, 1, 1]], [False])
    assert corrected(bank, [0.05]) == [[0.0, 0.0, 0.0, 0.0]]


def test_what_nobody_asked_for_is_shown_when_it_is_drawn_and_open_before() -> None:
    bank = bank_of([0.0], [[0, 0, 0, 0]], [False])
    assert corrected(bank, [0.9]) == [[OPEN, 1.0, 1.0, 1.0]]


def test_what_is_not_clear_is_left_open() -> None:
    bank = bank_of([1.0, 0.0], [[OPEN, 1, 1, 1], [0, 0, 0, 0]], [False, False])
    assert corrected(bank, [0.5, 0.5]) == [[OPEN] * 4, [OPEN] * 4]


def test_steps_before_a_run_was_redirected_keep_their_labels() -> None:
    bank = bank_of([1.0], [[OPEN, 1, 0, 0]], [True])
    assert corrected(bank, [0.02]) == [[OPEN, 1.0, 0.0, 0.0]]
    assert corrected(bank, [0.95]) == [[OPEN, 1.0, 1.0, 1.0]]


def test_steps_that_were_open_late_stay_open_and_the_bank_is_not_changed() -> None:
    bank = bank_of([1.0], [[OPEN, 1, OPEN, OPEN]], [True])
    assert corrected(bank, [0.99]) == [[OPEN, 1.0, OPEN, OPEN]]
    assert bank.shown.view(-1).tolist() == [OPEN, 1.0, OPEN, OPEN]


def test_a_run_without_such_steps_keeps_its_labels() -> None:
    bank = bank_of([1.0, 0.0], [[OPEN, 1, 1, 1], [0, 0, 0, 0]], [False, False])
    bank.timestep[4:] = torch.tensor([901.0, 801.0, 701.0, 601.0])
    rows = telling_rows(bank)
    assert rows.tolist() == [2, 3]
    labels = with_what_was_drawn(bank, rows, torch.tensor([[0.9], [0.9]])).shown.view(-1, 4).tolist()
    assert labels == [[OPEN, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]]
