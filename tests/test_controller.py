"""The controller's state machine, against the design's pseudocode in plain Python."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_module import CONCEPTS, TOKENS, WIDTH, firing, seen_at, small_module, unguided
from torch import Tensor

from saferedir_torch.controller import Controller, Guided, Policy, Seen, State, Verdict, amplification
from saferedir_torch.detector import Step
from saferedir_torch.eager_policy import NEVER
from saferedir_torch.estimate import FARTHEST, shown_estimate

BATCH = 6


@pytest.fixture(scope="module")
def controller() -> Controller:
    return Controller(small_module()).eval()


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def latents(seed: int, batch: int = BATCH) -> Tensor:
    return drawn(seed, batch, 4, 16, 16)


def prompts(seed: int, batch: int = BATCH) -> Tensor:
    return drawn(seed, batch, TOKENS, WIDTH)


def flags(*rows: str) -> Tensor:
    """Concepts by letter, as in `flags("ab", "")`."""
    return torch.tensor([[name in row for name in "abc"] for row in rows])


@torch.no_grad()
def test_follows_the_pseudocode_step_by_step(controller: Controller) -> None:
    original = prompts(1)
    period = torch.tensor([0, 1, 2, 3, 1, 0], dtype=torch.int32)
    enabled = flags("abc", "a", "", "abc", "bc", "abc")
    state = State.initial(original, CONCEPTS)
    _, first = controller(seen_at(latents(0)), original, unguided(original), state, firing(flags(*[""] * BATCH)))
    usual = first.score.median(dim=0).values
    policy = Policy(period, torch.where(enabled, usual, NEVER))
    cooldown, active = [0] * BATCH, torch.zeros(BATCH, CONCEPTS, dtype=torch.bool)
    firings = rested = fell_back = 0
    for step in range(12):
        before, seen = state, seen_at(latents(step), 0.9 - step / 15, latents(50 + step) if step else None)
        state, verdict = controller(seen, original, unguided(original), before, policy)
        scored = scores_of(controller, seen, before.prompt, original)
        torch.testing.assert_close(verdict.score, torch.sigmoid(scored.statistic))
        for row in range(BATCH):
            if cooldown[row] > 0:
                cooldown[row] -= 1
                expected, rested = torch.zeros(CONCEPTS, dtype=torch.bool), rested + 1
            else:
                expected = (verdict.score[row] >= usual) & enabled[row]
            again = expected & active[row]
            active[row] |= expected
            assert torch.equal(verdict.fired[row], expected)
            if expected.any():
                cooldown[row], firings = int(period[row]), firings + 1
                moved = controller.module.redirect(scored, [original], active, again.expand(BATCH, -1)).streams[0][row]
                fell_back += bool(again.any())
                assert torch.equal(state.prompt[row], moved)
            else:
                assert torch.equal(state.prompt[row], before.prompt[row])
        assert state.cooldown.tolist() == cooldown
        assert torch.equal(state.active, active)
        assert state.ok.all()
    assert firings > BATCH
    assert rested > 3
    assert fell_back > 3
    assert not active[2].any()


def scores_of(controller: Controller, seen: Seen, prompt: Tensor, original: Tensor, drawn: Tensor | None = None) -> Any:
    """What the module makes of a step without the controller; what is `drawn` is the prompt in force itself, or amplified."""
    estimate = torch.where(seen.known[:, None, None, None], shown_estimate(seen.denoised), 0.0)
    features = controller.module.features(Step(seen.latent, estimate, seen.share))
    return controller.module.score(features, seen.known, [prompt if drawn is None else drawn], [prompt], [original])


@torch.no_grad()
def test_requests_of_a_batch_share_nothing(controller: Controller) -> None:
    """To the bit in the deployed graph alone (`test_safety_graph`): torch's kernels differ from batch to batch."""
    original, seen = prompts(2), seen_at(latents(2), denoised=latents(30))
    guided = Guided(prompts(31), torch.linspace(0, 1, BATCH))
    policy = Policy(torch.arange(BATCH, dtype=torch.int32), torch.full((BATCH, CONCEPTS), 0.5))
    together, verdict = controller(seen, original, guided, State.initial(original, CONCEPTS), policy)
    assert verdict.fired.any()
    assert not verdict.fired.all()
    for row in range(BATCH):
        own = [type(part)(*(tensor[row : row + 1] for tensor in part)) for part in (seen, guided, policy)]
        prompt = original[row : row + 1]
        alone, found = controller(own[0], prompt, own[1], State.initial(prompt, CONCEPTS), own[2])
        for one, other in zip((*alone, *found), (*together, *verdict), strict=True):
            torch.testing.assert_close(one[0], other[row], rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("where", ["latent", "share", "denoised", "prompt", "original", "negative", "amplification"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_finite_is_never_ok_and_stays_with_its_request(controller: Controller, where: str, value: float) -> None:
    original, fires = prompts(3), torch.ones(BATCH, CONCEPTS, dtype=torch.bool)
    given = {
        "latent": latents(3), "share": torch.full((BATCH,), 0.5), "denoised": latents(4), "prompt": prompts(5),
        "original": original, "negative": prompts(6), "amplification": torch.full((BATCH,), 0.5),
    }  # fmt: skip

    def step(told: dict[str, Tensor]) -> tuple[State, Verdict]:
        seen = Seen(told["latent"], told["share"], told["denoised"], torch.ones(BATCH, dtype=torch.bool))
        guided, state = Guided(told["negative"], told["amplification"]), State.initial(told["prompt"], CONCEPTS)
        return controller(seen, told["original"], guided, state, firing(fires))

    clean, verdict = step(given)
    assert clean.ok.all()
    spoilt = given[where].clone()
    spoilt[1].view(-1)[0] = value
    state, other = step(given | {where: spoilt})
    assert state.ok.tolist() == [True, False, True, True, True, True]
    rest = torch.arange(BATCH) != 1
    assert all(torch.equal(one[rest], two[rest]) for one, two in zip((*clean, *verdict), (*state, *other), strict=True))
    again, _ = controller(seen_at(latents(7)), original.nan_to_num(), unguided(original), state, firing(~fires))
    assert not again.ok[1]


@torch.no_grad()
def test_requests_with_an_estimate_and_without_one_are_scored_together(controller: Controller) -> None:
    original, seen = prompts(8), seen_at(latents(8), denoised=9 * latents(9))
    seen.denoised[2:] = 0
    policy = firing(flags(*[""] * BATCH))

    def step(seen: Seen) -> tuple[State, Verdict]:
        return controller(seen, original, unguided(original), State.initial(original, CONCEPTS), policy)

    nothing, known = torch.zeros(BATCH, dtype=torch.bool), torch.tensor([True, True, False, False, False, False])
    _, first = step(seen._replace(denoised=torch.zeros_like(seen.denoised), known=nothing))
    _, mixed = step(seen._replace(known=known))
    assert torch.equal(mixed.score[2:], first.score[2:])
    assert not torch.equal(mixed.score[:2], first.score[:2])
    _, bounded = step(seen._replace(denoised=seen.denoised.clamp(-FARTHEST, FARTHEST), known=known))
    assert torch.equal(mixed.score, bounded.score)


@torch.no_grad()
def test_what_a_step_shows_alone_counts_only_once_there_is_an_estimate(controller: Controller) -> None:
    module, original = controller.module, prompts(10)
    features = module.features(Step(latents(10), latents(11), torch.full((BATCH,), 0.4)))
    read = module.last_branch.read(features.joint[:BATCH], [original])
    own = module.last_branch.answers(features, read.context, read.tokens)
    raised = (own.shown > own.told).any(dim=1)
    assert raised.any()
    first = module.score(features, torch.zeros(BATCH, dtype=torch.bool), [original], [original], [original]).statistic
    later = module.score(features, torch.ones(BATCH, dtype=torch.bool), [original], [original], [original]).statistic
    assert torch.equal(first, own.told)
    assert torch.equal(later, torch.maximum(own.told, own.shown))


@torch.no_grad()
def test_a_concept_that_is_not_looked_for_never_fires() -> None:
    module = small_module()
    module.last_branch.detector.head.bias.fill_(1e4)
    original = prompts(12)
    policy = firing(torch.zeros(BATCH, CONCEPTS, dtype=torch.bool))
    seen = seen_at(latents(12), denoised=latents(13))
    state, verdict = Controller(module)(seen, original, unguided(original), State.initial(original, CONCEPTS), policy)
    assert (verdict.score == 1).all()
    assert not verdict.fired.any()
    assert torch.equal(state.prompt, original)
    assert not verdict.token_mask.any()


@torch.no_grad()
def test_what_guidance_amplifies_is_read_as_it_will_be_drawn(controller: Controller) -> None:
    original, negative, amount = prompts(14), prompts(15), torch.tensor([0.0, 0.2, 0.5, 1.0, 1.4, 3.0])
    state, policy = State.initial(original, CONCEPTS), firing(torch.ones(BATCH, CONCEPTS, dtype=torch.bool))
    seen = seen_at(latents(14), denoised=latents(16))
    moved, verdict = controller(seen, original, Guided(negative, amount), state, policy)
    drawn_at = original + amount[:, None, None] * (original - negative)
    expected = scores_of(controller, seen, original, original, drawn_at)
    assert torch.equal(verdict.score, torch.sigmoid(expected.statistic))
    plain = scores_of(controller, seen, original, original)
    assert torch.equal(plain.statistic[0], expected.statistic[0])
    assert not torch.equal(plain.statistic[1], expected.statistic[1])
    # What is moved is the prompt itself, whatever guidance makes of it.
    assert torch.equal(moved.prompt, controller(seen, original, unguided(original), state, policy)[0].prompt)


def test_guidance_counts_above_the_usual_scale() -> None:
    assert [amplification(scale) for scale in (0, 1, 3.5, 5)] == [0, 0, 0, 0]
    assert [amplification(scale) for scale in (7.5, 10, 12)] == pytest.approx([0.5, 1.0, 1.4])


@torch.no_grad()
def test_what_fires_again_falls_back_to_a_safe_prompt_or_keeps_its_subject() -> None:
    module = small_module()
    module.last_branch.keeps_subject[1] = 1  # b is a style
    original = prompts(17)
    fires = flags("a", "bc", "abc", "", "b", "ab")
    active = flags("", "b", "bc", "abc", "b", "ab")
    state = State.initial(original, CONCEPTS)._replace(active=active)
    seen = seen_at(latents(17), denoised=latents(18))
    ended, verdict = Controller(module)(seen, original, unguided(original), state, firing(fires))
    assert torch.equal(verdict.fired, fires)
    scored = scores_of(Controller(module), seen, original, original)
    everything = active | fires
    moved = module.redirect(scored, [original], everything, torch.zeros_like(fires)).streams[0]
    found = module.last_branch.redirection(scored.step, scored.read[0], everything.float())
    aims = original + found.directions[0]
    (safe,) = module.last_branch.fallback
    expected = [moved[0], aims[1], safe[2], original[3], aims[4], safe[0]]
    assert torch.equal(ended.prompt, torch.stack(expected))
    masks = torch.where(everything[:, :, None], found.mask[:, None], 0.0)
    torch.testing.assert_close(verdict.token_mask, masks)


@torch.no_grad()
def test_a_concept_that_fires_later_moves_what_fired_before_as_well(controller: Controller) -> None:
    original, module = prompts(19), controller.module
    none, first, second = flags(*[""] * BATCH), flags(*["a"] * BATCH), flags(*["b"] * BATCH)
    seen = seen_at(latents(19))
    state, _ = controller(seen, original, unguided(original), State.initial(original, CONCEPTS), firing(first))
    seen = seen_at(latents(20), denoised=latents(21))
    both, verdict = controller(seen, original, unguided(original), state, firing(second))
    assert torch.equal(both.active, first | second)
    scored = scores_of(controller, seen, state.prompt, original)
    assert torch.equal(both.prompt, module.redirect(scored, [original], first | second, none).streams[0])
    assert not torch.equal(both.prompt, module.redirect(scored, [original], second, none).streams[0])
    assert (verdict.token_mask[:, :2] > 0).all()
    assert not verdict.token_mask[:, 2].any()
