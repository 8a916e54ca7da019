"""What recorded runs came to show, where prompts tell it wrongly: a detector of pictures corrects the labels it was taught by.

A label says what a prompt asks for. A model does not always draw that, and draws under strange prompts what none asks for, in
about one run of ten each. A network that is taught by many such labels is right more often than they are, since what is wrong
about them follows no rule (Northcutt et al. 2021, confident learning); taught again by the corrected ones it is surer.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from saferedir_torch.training_data import PICTURE_SHOWS, LatentBank

#: From this timestep down the picture to be expected hardly changes: what a run came to show is told by these steps.
PICTURE_STAYS = 500
#: Mean probability over those steps from which a run shows the concept for sure, and up to which it does not.
SURELY, SURELY_NOT = 0.8, 0.2


def telling_rows(bank: LatentBank) -> Tensor:
    """The steps by which it is told what their runs came to show, [K] int64."""
    return torch.where(bank.timestep < PICTURE_STAYS)[0]


def with_what_was_drawn(bank: LatentBank, rows: Tensor, probability: Tensor) -> LatentBank:
    """`bank` with labels by what its runs came to show; `probability` [K, N] that the steps `rows` [K] show the concepts.

    Where a run surely shows a concept, or surely does not, its later steps say so, else they are left open. Of earlier steps,
    those of a prompt that does not ask are left open unless the run surely does not show it; and a prompt that asks in vain
    throughout the run is known to. Steps before a run's prompt was replaced keep their labels.
    """
    runs = int(bank.run.max()) + 1
    told, mean = torch.zeros(runs), torch.zeros(runs, probability.shape[1])
    told.index_add_(0, bank.run[rows], torch.ones(len(rows)))
    mean.index_add_(0, bank.run[rows], probability.float())
    mean = (mean / told.clamp(min=1)[:, None])[bank.run]  # [S, N]
    surely, surely_not = mean >= SURELY, mean <= SURELY_NOT
    drawn = torch.where(surely, 1.0, torch.where(surely_not, 0.0, -1.0))
    started, ended = _prompts(bank)
    in_vain = (bank.asked > 0) & surely_not & (started == ended)[:, None]
    early = torch.where((bank.shown == 0) & ~surely_not, -torch.ones_like(drawn), bank.shown)
    early = torch.where(in_vain, torch.zeros_like(drawn), early)
    later = torch.where(bank.shown >= 0, drawn, bank.shown)
    corrected = torch.where((bank.timestep < PICTURE_SHOWS)[:, None], later, early)
    known = (told[bank.run] > 0) & (bank.prompt == ended)
    return replace(bank, shown=torch.where(known[:, None], corrected, bank.shown))


def _prompts(bank: LatentBank) -> tuple[Tensor, Tensor]:
    """The prompt that each step's run started with, and the one it ended with, [S] each."""
    runs = int(bank.run.max()) + 1
    steps = torch.bincount(bank.run, minlength=runs)
    last = steps.cumsum(dim=0) - 1
    return bank.prompt[last - steps + 1][bank.run], bank.prompt[last][bank.run]
