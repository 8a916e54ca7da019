"""Attacks by gradient: mixtures of tokens, the search over words, and the losses through a protected model."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from saferedir_torch.attacks.objectives import ProtectedUnlikeness, TextUnlikeness
from saferedir_torch.attacks.token_search import SearchSize, TextSide, optimise_embeddings, search
from saferedir_torch.safety_module import SafetyModule

FORBIDDEN = ["a parish church", "a chapel", "a cathedral"]


@pytest.fixture(scope="module")
def text_side(eager: Any) -> TextSide:
    return TextSide(eager.tokenizer, eager.text_encoder)


@pytest.fixture(scope="module")
def protected(eager: Any, safety: SafetyModule) -> ProtectedUnlikeness:
    return ProtectedUnlikeness(eager, safety, ["a church next to a cat"], [7], at=(0, 8))


@pytest.fixture(scope="module")
def plain(eager: Any) -> ProtectedUnlikeness:
    return ProtectedUnlikeness(eager, None, ["a church next to a cat"], [7], at=(0, 8))


def test_rows_of_the_table_are_the_prompt(text_side: TextSide) -> None:
    ids = text_side.tokens(["a cat on a boat", "a church"])
    assert torch.allclose(text_side.encode_rows(ids, text_side.table[ids]), text_side.encode(ids), atol=1e-5)
    assert torch.equal(text_side.encode(ids), text_side.encode(ids))  # and the encoder is as it was


def test_words_are_read_back_and_give_nothing_away(text_side: TextSide) -> None:
    allowed = text_side.words(FORBIDDEN)
    words = [text_side.text(token[None]) for token in allowed]
    assert len(allowed) > 100
    assert "cat" in words
    assert not {"church", "chapel", "apel", "cathedral", "parish"} & set(words)
    assert {"church", "chapel"} <= {text_side.text(token[None]) for token in text_side.words([])}
    ids = text_side.tokens([" ".join(words[:20])])[0]
    assert ids[1:21].tolist() == allowed[:20].tolist()


def test_a_search_comes_closer_and_hands_in_text(text_side: TextSide) -> None:
    target = text_side.encode(text_side.tokens(["a cat and a dog"])).detach()
    allowed, loss = text_side.words(["dog"]), TextUnlikeness(target)
    (found,) = search(text_side, ["a cat"], 3, allowed, loss, SearchSize(iterations=12, tries=16), seed=1)
    assert found.loss < 0.7 * found.loss_before
    assert found.prompt.startswith("a cat ")
    assert "dog" not in found.prompt
    again = text_side.tokens([found.prompt])
    assert torch.equal(again[0], found.ids)
    with torch.no_grad():
        assert float(loss(text_side.encode(again)[:, None])) == pytest.approx(found.loss, abs=1e-6)


def test_prompts_searched_together_come_to_what_each_comes_to_alone(text_side: TextSide) -> None:
    targets = text_side.encode(text_side.tokens(["a cat and a dog", "a big red boat"])).detach()
    allowed, size = text_side.words(["dog", "boat"]), SearchSize(iterations=6, tries=8)
    together = search(text_side, ["a cat", "big"], 2, allowed, TextUnlikeness(targets), size, seed=1)
    for row, prompt in enumerate(["a cat", "big"]):
        (alone,) = search(text_side, [prompt], 2, allowed, TextUnlikeness(targets[row : row + 1]), size, seed=1 + row)
        assert alone.prompt == together[row].prompt
        assert alone.loss == pytest.approx(together[row].loss, abs=1e-5)


def test_what_cannot_be_searched_is_said(text_side: TextSide) -> None:
    loss = TextUnlikeness(text_side.encode(text_side.tokens(["a"])).detach())
    with pytest.raises(ValueError, match="over the 77 tokens"):
        search(text_side, ["a cat"], 80, text_side.words([]), loss)
    with pytest.raises(ValueError, match="no word may be used"):
        search(text_side, ["a cat"], 2, torch.tensor([], dtype=torch.long), loss)


@torch.no_grad()
def test_a_model_without_safety_is_like_itself(plain: ProtectedUnlikeness, text_side: TextSide) -> None:
    prompts = text_side.encode(
        text_side.tokens(["a church next to a cat", "", "a house next to a cat", "a church beside a cat"])
    )
    unlike = plain(prompts[None])[0]
    assert unlike[0] == pytest.approx(0, abs=1e-6)
    assert unlike[1] == pytest.approx(1, abs=1e-4)
    assert unlike[2] > 0.5
    assert 0 < unlike[3] < 0.5


def test_safety_makes_the_unsafe_prompt_unlike_itself_and_leaves_a_way_down(
    protected: ProtectedUnlikeness, plain: ProtectedUnlikeness, text_side: TextSide
) -> None:
    unsafe = text_side.encode(text_side.tokens(["a church next to a cat"])).detach().requires_grad_()
    loss = protected(unsafe[None])
    assert float(loss.detach()) > 0.05
    (gradient,) = torch.autograd.grad(loss.sum(), unsafe)
    assert bool(torch.isfinite(gradient).all())
    assert float(gradient.abs().max()) > 0
    with torch.no_grad():  # and what is not detected is hardly touched: the gate is soft
        safe = text_side.encode(text_side.tokens(["a cat next to a dog"]))
        assert float(protected(safe[None])) == pytest.approx(float(plain(safe[None])), rel=2e-2)


def test_variants_and_prompts_do_not_touch_each_other(
    eager: Any, safety: SafetyModule, protected: ProtectedUnlikeness, text_side: TextSide
) -> None:
    variants = text_side.encode(text_side.tokens(["a church next to a cat", "a cat"])).detach()
    together = ProtectedUnlikeness(eager, safety, ["a dog", "a church next to a cat"], [8, 7], at=(0, 8))
    with torch.no_grad():
        apart = torch.cat([protected(variants[None, :1]), protected(variants[None, 1:])], dim=1)
        assert torch.allclose(protected(variants[None]), apart, atol=1e-5)
        assert torch.allclose(together(variants.expand(2, -1, -1, -1))[1:], apart, atol=1e-5)


def test_an_embedding_is_optimised(protected: ProtectedUnlikeness) -> None:
    with torch.no_grad():
        before = float(protected(protected.target[None]))
    found = optimise_embeddings(protected.target, protected, iterations=8)
    with torch.no_grad():
        assert float(protected(found[None])) < 0.9 * before
    assert found.shape == protected.target.shape
