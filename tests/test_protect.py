"""The eager hook on a stock diffusers pipeline, and its parity with the runtime."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch

from saferedir.engines.errors import NonFiniteError, RequestError
from saferedir.runtime import Pipeline, SafetyPolicy
from saferedir.runtime.schedulers import SCHEDULERS
from saferedir_torch.models import SHIPPED_SAFETY
from saferedir_torch.protect import EagerPolicy, protect
from saferedir_torch.safety_module import SafetyModule
from saferedir_torch.trajectories import SAMPLERS

STEPS = 4
#: Those whose estimates differ a little between eager and deployed.
APART = ("dpm++-2m-karras", "dpm++-2m-exponential", "lcm")
ALWAYS = EagerPolicy(thresholds={"church": 0.0})


@pytest.fixture(scope="module")
def shipped() -> SafetyModule:
    """As in the embedded bundle."""
    return SafetyModule.load(SHIPPED_SAFETY)


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def draw(pipe: Any, prompts: list[str] | None, seeds: list[int], **options: Any) -> np.ndarray[Any, np.dtype[Any]]:
    options = {"num_inference_steps": STEPS, "guidance_scale": 5.0, "output_type": "np"} | options
    images = pipe(prompts, generator=generators(*seeds), **options).images
    return np.asarray((images * 255).round(), np.int16)


@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_any_batch_images_per_prompt_and_embeddings(eager: Any, safety: SafetyModule, guidance: float) -> None:
    with protect(eager, safety, ALWAYS) as guard:
        both = draw(eager, ["a church", "a cat"], [1, 2, 3, 4], num_images_per_prompt=2, guidance_scale=guidance)
        concepts = len(safety.config.concepts)
        assert guard.last.scores.shape == (STEPS, 4, concepts)
        assert guard.last.token_masks.shape == (4, concepts, 77)
        alone = draw(eager, ["a cat"], [3], guidance_scale=guidance)
        embeds = eager.encode_prompt(["a cat"], "cpu", 1, False)[0]
        given = draw(eager, None, [3], prompt_embeds=embeds, guidance_scale=guidance)
    assert (np.abs(both[2] - alone[0]) > 1).mean() <= 1e-3
    assert np.array_equal(alone, given)


def test_state_starts_anew_with_every_call(eager: Any, safety: SafetyModule) -> None:
    with protect(eager, safety, ALWAYS) as guard:
        draw(eager, ["a church"], [1])
        first = guard.last
        draw(eager, ["a cat"], [1])
    assert guard.last is not first
    assert [len(record.timesteps) for record in (first, guard.last)] == [STEPS] * 2


def test_mixed_batch_equals_each_alone(eager: Any, safety: SafetyModule) -> None:
    prompts = ["a church", "", "an abbey next to a dog", "a cat"]
    with protect(eager, safety) as guard:
        together = draw(eager, prompts, list(range(4)))
        fired = guard.last.fired
        for row, text in enumerate(prompts):
            alone = draw(eager, [text], [row])
            assert (np.abs(together[row] - alone[0]) > 1).mean() <= 1e-3
            assert torch.equal(guard.last.fired[:, 0], fired[:, row])


@pytest.mark.parametrize("guidance", [1.0, 5.0])
@pytest.mark.parametrize("always", [False, True])
def test_runtime_draws_the_same(pipeline: Pipeline, eager: Any, shipped: SafetyModule, guidance: float, always: bool) -> None:
    prompts, seeds = ["a church", "a cat", "a minster next to a fish in ink style"], [11, 12, 13]
    policy = SafetyPolicy(thresholds={"church": 0.0}) if always else SafetyPolicy()
    runtime = Pipeline(pipeline.bundle, pipeline.backend, policy)
    found = runtime(prompts, seed=seeds, num_inference_steps=STEPS, guidance_scale=guidance, negative_prompt="a dog")
    with protect(eager, shipped, ALWAYS if always else None) as guard:
        expected = draw(eager, prompts, seeds, guidance_scale=guidance, negative_prompt=["a dog"] * 3)
    for row, (image, record) in enumerate(zip(found.images, found.records, strict=True)):
        assert (np.abs(np.asarray(image).astype(np.int16) - expected[row]) > 1).mean() <= 1e-3
        scores = [step.score["church"] for step in record.steps]
        np.testing.assert_allclose(scores, guard.last.scores[:, row, 0], atol=1e-4)
        assert [bool(step.fired) for step in record.steps] == guard.last.fired[:, row, 0].tolist()


@pytest.mark.parametrize("sampler", SCHEDULERS)
def test_under_every_sampler_the_runtime_sees_the_same(
    pipeline: Pipeline, eager: Any, shipped: SafetyModule, sampler: str
) -> None:
    prompts, seeds = ["a minster next to a fish in ink style", "a cat"], [11, 12]
    found = pipeline(prompts, seed=seeds, num_inference_steps=STEPS, guidance_scale=5.0, scheduler=sampler)
    kind, options = SAMPLERS[sampler]
    other = copy.copy(eager)
    other.scheduler = kind.from_config(eager.scheduler.config, **options)
    with protect(other, shipped) as guard:
        expected = draw(other, prompts, seeds)
    record = guard.last
    scores = np.array([[[step.score[name] for name in record.concepts] for step in own.steps] for own in found.records])
    fired = [[[name in step.fired for name in record.concepts] for step in own.steps] for own in found.records]
    # Where diffusers rounds timesteps of other levels, and lcm's boundary condition takes a part of the latent as it is, the
    # runtime goes by the level and the estimate that are drawn with, the eager hook by what the denoiser is told.
    np.testing.assert_allclose(scores.swapaxes(0, 1), record.scores, atol=2e-3 if sampler in APART else 1e-5)
    assert np.array_equal(np.array(fired).swapaxes(0, 1), record.fired) and record.fired.any()
    assert np.abs(np.stack([np.asarray(image, np.int16) for image in found.images]) - expected).max() <= 1


def test_torch_backend_runs_the_same_loop(pipeline: Pipeline) -> None:
    torch_pipeline = Pipeline.from_bundle(backend="torch")
    for guidance in (1.0, 5.0):
        a = torch_pipeline("a church", seed=3, num_inference_steps=4, guidance_scale=guidance)
        b = pipeline("a church", seed=3, num_inference_steps=4, guidance_scale=guidance)
        difference = np.abs(np.asarray(a.images[0]).astype(int) - np.asarray(b.images[0]))
        assert (difference > 1).mean() <= 1e-3


@pytest.mark.parametrize(
    ("policy", "said"),
    [
        ({"enabled": ("cathedral",)}, "unknown concept 'cathedral'; expected some of church, ink, weapons"),
        ({"thresholds": {"spire": 0.5}}, "unknown concept 'spire'"),
        ({"enabled": ()}, "enabled is empty, and looking for nothing is not protection"),
        ({"enabled": "church"}, "enabled is 'church'; expected a tuple of concepts"),
        ({"thresholds": {"church": float("nan")}}, "thresholds of 'church' is nan; expected a finite number"),
        ({"thresholds": {"church": 1.01}}, "threshold of 'church' is 1.01; expected a finite value of at most 1"),
        ({"thresholds": {"church": "0.5"}}, "thresholds of 'church' is '0.5'"),
        ({"cooldown": -1}, "cooldown is -1; expected a whole number of 0 to 1000 steps"),
        ({"cooldown": "2"}, "cooldown is '2'"),
        ({"cooldown": True}, "cooldown is True"),
    ],
)
def test_a_policy_that_cannot_be_kept_is_refused(eager: Any, safety: SafetyModule, policy: Any, said: str) -> None:
    with pytest.raises(RequestError, match=said), protect(eager, safety, EagerPolicy(**policy)):
        pass


def test_the_record_states_what_was_looked_for(eager: Any, safety: SafetyModule) -> None:
    policy = EagerPolicy(enabled=("ink",), thresholds={"ink": 0.25}, cooldown=0)
    with protect(eager, safety, policy):
        record = eager("a church", num_inference_steps=1, output_type="latent").safety
    assert record.concepts == ("church", "ink", "weapons")
    assert record.policy.enabled == ("ink",)
    assert record.policy.thresholds == {"church": 0.5, "ink": 0.25, "weapons": 0.5}
    assert record.policy.cooldown == 0
    assert record.scores[0, 0, 0] > 0.9 and not record.fired.any()


def test_nan_latent_gives_no_picture(eager: Any, safety: SafetyModule) -> None:
    latents = torch.full((1, 4, 16, 16), float("nan"))
    with protect(eager, safety), pytest.raises(NonFiniteError):
        eager(["a cat"], latents=latents, num_inference_steps=2)
