"""Alignment is a bijection; equal words find each other; exact targets reach what they can."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saferedir_torch.alignment import align, aligned_targets, changed_tokens, exact_redirection

END = 99


def prompt(words: list[int], length: int = 12) -> torch.Tensor:
    return torch.tensor([1, *words, *[END] * (length - 1 - len(words))])


@settings(max_examples=60, deadline=None)
@given(a=st.lists(st.integers(2, 9), max_size=8), b=st.lists(st.integers(2, 9), max_size=8), seed=st.integers(0, 999))
def test_is_a_bijection(a: list[int], b: list[int], seed: int) -> None:
    embeds = torch.randn(2, 12, 4, generator=torch.Generator().manual_seed(seed))
    assert sorted(align(prompt(a), prompt(b), embeds[0], embeds[1], END).tolist()) == list(range(12))


def test_equal_words_find_each_other_at_other_places() -> None:
    embeds = torch.randn(2, 12, 4, generator=torch.Generator().manual_seed(0))
    partner = align(prompt([5, 6, 7, 8]), prompt([2, 7, 8]), embeds[0], embeds[1], END)
    assert partner[3].item() == 2
    assert partner[4].item() == 3


def test_equal_prompts_need_no_change() -> None:
    ids = prompt([4, 5, 6])[None]
    embeds = torch.randn(1, 12, 4, generator=torch.Generator().manual_seed(1))
    target = aligned_targets(ids, ids, embeds, embeds, END)
    assert torch.equal(target, embeds)
    assert not changed_tokens(embeds, target, 0.01).any()


def test_formula_reaches_targets_within_its_strength() -> None:
    generator = torch.Generator().manual_seed(2)
    unsafe = torch.randn(3, 12, 16, generator=generator)
    near = unsafe + 0.5 * torch.randn(3, 12, 16, generator=generator)
    torch.testing.assert_close(exact_redirection(unsafe, near, -1.0, 1.5), near, rtol=1e-4, atol=1e-4)
    far = -3 * unsafe
    reached = exact_redirection(unsafe, far, -1.0, 1.5)
    torch.testing.assert_close((reached - unsafe).norm(dim=-1), 1.5 * unsafe.norm(dim=-1))
