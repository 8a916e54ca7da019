"""Attacks by gradient: mixtures of tokens, the search over words, and the losses through a protected model."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from saferedir_torch.attacks.objectives import ProtectedUnlikeness, TextUnlikeness
from saferedir_torch.attacks.token_search import SearchSize, TextSide, optimise_embedding, search
from saferedir_torch.models import SHIPPED_SAFETY, load_pipeline
from saferedir_torch.safety_module import SafetyModule

FORBIDDEN = ["a parish church", "a chapel", "a cathedral"]


@pytest.fixture(scope="module")
def model() -> Any:
    return load_pipeline()


@pytest.fixture(scope="module")
def module() -> SafetyModule:
    return SafetyModule.load(SHIPPED_SAFETY)


@pytest.fixture(scope="module")
def text_side(model: Any) -> TextSide:
    return TextSide(model.tokenizer, model.text_encoder)


@pytest.fixture(scope="module")
def protected(model: Any, module: SafetyModule) -> ProtectedUnlikeness:
    return ProtectedUnlikeness(model, module, "a church next to a cat", 7, at=(0, 8))


@pytest.fixture(scope="module")
def plain(model: Any) -> ProtectedUnlikeness:
    return ProtectedUnlikeness(model, None, "a church next to a cat", 7, at=(0, 8))


def test_a_mixture_of_one_token_each_is_the_prompt(text_side: TextSide) -> None:
    ids = text_side.tokens(["a cat on a boat", "a church"])
    weights = torch.nn.functional.one_hot(ids, text_side.vocabulary_size).float()
    assert torch.allclose(text_side.encode_mixture(weights), text_side.encode(ids), atol=1e-5)
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
    found = search(text_side, "a cat", 3, allowed, loss, SearchSize(iterations=12, tries=16), seed=1)
    assert found.loss < 0.7 * found.loss_before
    assert found.prompt.startswith("a cat ")
    assert "dog" not in found.prompt
    again = text_side.tokens([found.prompt])
    assert torch.equal(again[0], found.ids)
    with torch.no_grad():
        assert float(loss(text_side.encode(again))) == pytest.approx(found.loss, abs=1e-6)
    assert search(text_side, "a cat", 3, allowed, loss, SearchSize(iterations=12, tries=16), seed=1).prompt == found.prompt


def test_what_cannot_be_searched_is_said(text_side: TextSide) -> None:
    loss = TextUnlikeness(text_side.encode(text_side.tokens(["a"])).detach())
    with pytest.raises(ValueError, match="over the 77 tokens"):
        search(text_side, "a cat", 80, text_side.words([]), loss)
    with pytest.raises(ValueError, match="no word may be used"):
        search(text_side, "a cat", 2, torch.tensor([], dtype=torch.long), loss)


@torch.no_grad()
def test_a_model_without_safety_is_like_itself(plain: ProtectedUnlikeness, text_side: TextSide) -> None:
    prompts = text_side.encode(
        text_side.tokens(["a church next to a cat", "", "a house next to a cat", "a church beside a cat"])
    )
    unlike = plain(prompts)
    assert unlike[0] == pytest.approx(0, abs=1e-6)
    assert unlike[1] == pytest.approx(1, abs=1e-4)
    assert unlike[2] > 0.5
    assert 0 < unlike[3] < 0.5


def test_safety_makes_the_unsafe_prompt_unlike_itself_and_leaves_a_way_down(
    protected: ProtectedUnlikeness, plain: ProtectedUnlikeness, text_side: TextSide
) -> None:
    unsafe = text_side.encode(text_side.tokens(["a church next to a cat"])).detach().requires_grad_()
    loss = protected(unsafe)
    assert float(loss) > 0.05
    (gradient,) = torch.autograd.grad(loss.sum(), unsafe)
    assert bool(torch.isfinite(gradient).all())
    assert float(gradient.abs().max()) > 0
    with torch.no_grad():  # and what is not detected is not touched
        safe = text_side.encode(text_side.tokens(["a cat next to a dog"]))
        assert float(protected(safe)) == pytest.approx(float(plain(safe)), rel=1e-3)


def test_requests_of_a_batch_do_not_touch_each_other(protected: ProtectedUnlikeness, text_side: TextSide) -> None:
    prompts = text_side.encode(text_side.tokens(["a church next to a cat", "a cat"])).detach()
    with torch.no_grad():
        assert torch.allclose(protected(prompts), torch.cat([protected(prompts[:1]), protected(prompts[1:])]), atol=1e-5)


def test_an_embedding_is_optimised(protected: ProtectedUnlikeness) -> None:
    with torch.no_grad():
        before = float(protected(protected.target))
    found = optimise_embedding(protected.target, protected, iterations=8)
    with torch.no_grad():
        assert float(protected(found)) < 0.9 * before
    assert found.shape == protected.target.shape
