"""The controller's state machine, against the design's pseudocode in plain Python."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_module import CONCEPTS, TOKENS, WIDTH, small_module, unknown

from saferedir_torch.controller import Controller, Policy, State

BATCH = 6
VIGILANCE = 0.75


def made(**wishes: Any) -> Controller:
    return Controller(small_module(**wishes)).eval()


@pytest.fixture(scope="module")
def controller() -> Controller:
    return made()


def inputs(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Policy]:
    generator = torch.Generator().manual_seed(seed)
    latent = torch.randn(BATCH, 4, 16, 16, generator=generator)
    time = torch.full((BATCH,), 500.0)
    original = torch.randn(BATCH, TOKENS, WIDTH, generator=generator)
    policy = Policy(
        period=torch.tensor([0, 1, 2, 3, 1, 0], dtype=torch.int32),
        enabled=torch.tensor([[1, 1, 1], [1, 0, 0], [0, 0, 0], [1, 1, 1], [0, 1, 1], [1, 1, 1]], dtype=torch.bool),
        threshold=torch.full((BATCH, CONCEPTS), 0.5),
        alpha_scale=torch.full((BATCH, CONCEPTS), 1.5),
    )
    return latent, time, original, policy


@torch.no_grad()
def test_follows_the_pseudocode_step_by_step(controller: Controller) -> None:
    latent, time, original, policy = inputs(1)
    state = State.initial(original, CONCEPTS)
    cooldown, active = [0] * BATCH, [[False] * CONCEPTS for _ in range(BATCH)]
    firings = 0
    for step in range(10):
        before = state
        seen = latent + 0.3 * step * torch.randn(latent.shape, generator=torch.Generator().manual_seed(step))
        state, verdict = controller(seen, time, original, before, policy, *unknown(latent))
        for row in range(BATCH):
            if cooldown[row] > 0:
                cooldown[row] -= 1
                expected = [False] * CONCEPTS
            else:
                watched = torch.tensor(active[row])
                bound = torch.where(watched, VIGILANCE * policy.threshold[row], policy.threshold[row])
                over = (verdict.score[row] >= bound) & policy.enabled[row]
                expected = over.tolist()
                if any(expected):
                    active[row] = [a or f for a, f in zip(active[row], expected, strict=True)]
                    cooldown[row] = int(policy.period[row])
                    firings += 1
            assert verdict.fired[row].tolist() == expected
            if not any(expected):
                assert torch.equal(state.prompt[row], before.prompt[row])
        assert state.cooldown.tolist() == cooldown
        assert state.active.tolist() == active
    assert firings > BATCH


@torch.no_grad()
def test_a_concept_that_fired_fires_again_below_its_threshold_and_no_other_does(controller: Controller) -> None:
    latent, time, original, policy = inputs(6)
    fresh = State.initial(original, CONCEPTS)
    _, seen = controller(latent, time, original, fresh, policy, *unknown(latent))
    # Between three quarters of the threshold and all of it, for every concept.
    policy = policy._replace(enabled=torch.ones_like(policy.enabled), threshold=(seen.score * 1.2).clamp(max=1))
    _, before = controller(latent, time, original, fresh, policy, *unknown(latent))
    assert not before.fired.any()
    _, after = controller(
        latent, time, original, fresh._replace(active=torch.ones_like(fresh.active).tril()), policy, *unknown(latent)
    )
    assert torch.equal(after.fired, torch.ones_like(fresh.active).tril())


@torch.no_grad()
def test_requests_of_a_batch_share_nothing(controller: Controller) -> None:
    latent, time, original, policy = inputs(2)
    together, verdict = controller(latent, time, original, State.initial(original, CONCEPTS), policy, *unknown(latent))
    for row in range(BATCH):
        one = slice(row, row + 1)
        alone, own = controller(
            latent[one],
            time[one],
            original[one],
            State.initial(original[one], CONCEPTS),
            Policy(*(p[one] for p in policy)),
            *unknown(latent[one]),
        )
        torch.testing.assert_close(alone.prompt[0], together.prompt[row], rtol=1e-5, atol=1e-5)
        assert torch.equal(own.fired[0], verdict.fired[row])


@torch.no_grad()
@pytest.mark.parametrize("where", ["latent", "prompt", "original"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_finite_is_never_ok_and_stays_with_its_request(controller: Controller, where: str, value: float) -> None:
    latent, time, original, policy = inputs(3)
    policy = policy._replace(threshold=torch.zeros(BATCH, CONCEPTS))
    prompt = original.clone()
    {"latent": latent, "prompt": prompt, "original": original}[where][1].view(-1)[0] = value
    state, _ = controller(latent, time, original, State.initial(prompt, CONCEPTS), policy, *unknown(latent))
    assert state.ok.tolist() == [True, False, True, True, True, True]
    again, _ = controller(torch.zeros_like(latent), time, torch.zeros_like(original), state, policy, *unknown(latent))
    assert not again.ok[1]


@torch.no_grad()
def test_nothing_enabled_leaves_the_prompt_alone(controller: Controller) -> None:
    latent, time, original, policy = inputs(4)
    off = policy._replace(enabled=torch.zeros_like(policy.enabled), threshold=torch.zeros_like(policy.threshold))
    state, verdict = controller(latent, time, original, State.initial(original, CONCEPTS), off, *unknown(latent))
    assert torch.equal(state.prompt, original)
    assert not verdict.fired.any()
    assert not verdict.token_mask.any()


@torch.no_grad()
def test_what_fires_again_ends_in_its_refuge() -> None:
    having, without = made(refuge=True), made()
    without.module.load_state_dict(having.module.state_dict(), strict=False)
    refuge = torch.randn(CONCEPTS, TOKENS, WIDTH, generator=torch.Generator().manual_seed(5))
    having.module.last_branch.refuge.copy_(refuge)
    latent, time, original, _ = inputs(4)
    # Which concepts fire, and which were active before.
    fires = torch.tensor([[1, 0, 0], [0, 1, 1], [1, 1, 1], [0, 0, 0], [0, 1, 0], [1, 0, 1]], dtype=torch.bool)
    active = torch.tensor([[0, 0, 0], [0, 1, 0], [0, 1, 1], [1, 1, 1], [1, 0, 0], [1, 0, 1]], dtype=torch.bool)
    policy = Policy(
        period=torch.zeros(BATCH, dtype=torch.int32), enabled=fires, threshold=torch.zeros(BATCH, CONCEPTS),
        alpha_scale=torch.full((BATCH, CONCEPTS), 1.5),
    )  # fmt: skip
    state = State.initial(original, CONCEPTS)._replace(active=active)
    ended, verdict = having(latent, time, original, state, policy, *unknown(latent))
    moved, plain = without(latent, time, original, state, policy, *unknown(latent))
    assert torch.equal(verdict.fired, fires)
    for row, concept in {0: None, 1: 1, 2: 1, 3: None, 4: None, 5: 0}.items():
        assert torch.equal(ended.prompt[row], moved.prompt[row] if concept is None else refuge[concept])
    again = (fires & active)[:, :, None].expand_as(plain.token_mask)
    assert torch.equal(verdict.token_mask, torch.where(again, torch.ones_like(plain.token_mask), plain.token_mask))
