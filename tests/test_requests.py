"""Options are checked before anything is computed; a request may only tighten the operator's policy."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
from msgspec import structs
from tiny_bundle import MODEL

from saferedir.engines.errors import RequestError
from saferedir.runtime import Pipeline, SafetyPolicy, Tightening
from saferedir.runtime.policy import resolve
from saferedir.runtime.request import check_rescale

WIDTH = (77, 128)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "either prompts or prompt_embeds"),
        ({"prompts": []}, "prompts is empty"),
        ({"prompts": "a", "num_images_per_prompt": 0}, "num_images_per_prompt is 0"),
        ({"prompts": "a", "seed": 2**64}, "seed is 18446744073709551616"),
        ({"prompts": "a", "seed": 10**5000}, "seed is too large"),
        ({"prompts": "a", "seed": True}, "seed is True"),
        ({"prompts": "a", "num_images_per_prompt": 10**7}, "10000000 pictures are asked for; expected at most 1000 a call"),
        ({"prompts": ["a"] * 501, "num_images_per_prompt": 2}, "1002 pictures"),
        ({"prompt_embeds": np.zeros((3, *WIDTH)), "num_images_per_prompt": 10**9}, "3000000000 pictures"),
        ({"prompts": 3}, "prompts is int; expected text"),
        ({"prompts": {"a cat": 1}}, "prompts is dict; expected text, or a list of texts"),
        ({"prompts": {"a cat"}}, "prompts is set; expected text"),
        ({"prompts": b"a cat"}, "prompts is bytes; expected text"),
        ({"prompts": "a", "negative_prompt": {"b": 1}}, "negative_prompt is dict; expected text"),
        ({"prompts": "a", "negative_prompt": 3}, "negative_prompt is int; expected text"),
        ({"prompts": "a", "negative_prompt": [None]}, "negative_prompt is NoneType; expected text"),
        ({"prompts": "a", "negative_prompt": "a" * 10_001}, "negative_prompt has 10001 characters"),
        ({"prompts": "a", "guidance_scale": "5"}, "guidance_scale is '5'"),
        ({"prompts": "a", "guidance_scale": True}, "guidance_scale is True"),
        ({"prompts": "a", "guidance_scale": 10**400}, "expected a finite number"),
        ({"prompts": "a", "num_inference_steps": True}, "num_inference_steps is True"),
        ({"prompts": "a", "scheduler": ""}, "scheduler '' is not known"),
        ({"prompts": ["a", "b"], "seed": [1]}, "seed holds 1 values for 2"),
        ({"prompts": "a", "num_inference_steps": 0}, "num_inference_steps is 0"),
        ({"prompts": "a", "num_inference_steps": 10_000}, "num_inference_steps is 10000"),
        ({"prompts": "a", "guidance_scale": float("nan")}, "guidance_scale is nan"),
        ({"prompts": "a", "guidance_scale": float("inf")}, "guidance_scale is inf"),
        ({"prompts": "a", "guidance_scale": -2.0}, "guidance_scale is -2"),
        ({"prompts": "a" * 10_001}, "10001 characters"),
        ({"prompts": [3]}, "expected text"),
        ({"prompts": "cat \ud800"}, "surrogate pair at character 4"),
        ({"prompts": "a", "seed": 1.5}, "seed is 1.5"),
        ({"prompts": "a", "seed": "7"}, "seed is '7'"),
        ({"prompts": ["a", "b"], "seed": [1, None]}, "seed is None"),
        ({"prompts": "a", "num_inference_steps": 2.5}, "num_inference_steps is 2.5"),
        ({"prompts": "a", "num_images_per_prompt": "two"}, "num_images_per_prompt is 'two'"),
        ({"prompts": "a", "guidance_rescale": 1.5}, "guidance_rescale is 1.5; expected a number from 0 to 1"),
        ({"prompts": "a", "guidance_rescale": float("nan")}, "guidance_rescale is nan"),
        ({"prompts": "a", "guidance_rescale": "0.5"}, "guidance_rescale is '0.5'"),
        (
            {"prompts": "a", "guidance_rescale": 0.5, "guidance_scale": 1},
            "guidance_rescale is 0.5, but with guidance_scale 1 there is nothing to rescale",
        ),
        ({"prompts": "a", "guidance_scale": "much"}, "guidance_scale is 'much'"),
        ({"prompt_embeds": [["a"]]}, "no array of numbers"),
        ({"prompts": ["a", "b"], "negative_prompt": ["c"]}, "negative_prompt holds 1 texts for 2"),
        ({"prompt_embeds": np.zeros((1, 77, 64))}, r"\(1, 77, 64\)"),
        ({"prompt_embeds": np.full((1, *WIDTH), np.nan)}, "NaN"),
        ({"prompts": "a", "negative_prompt": "b", "negative_prompt_embeds": np.zeros((1, *WIDTH))}, "not both"),
        ({"prompts": ["a", "b"], "negative_prompt_embeds": np.zeros((3, *WIDTH))}, "holds 3 embeddings"),
        ({"prompts": "a", "tighten": Tightening(thresholds={"church": 1.0})}, "only lower"),
        ({"prompts": "a", "tighten": Tightening(thresholds={"church": float("-inf")})}, "expected a finite number"),
        ({"prompts": "a", "tighten": Tightening(alpha_scales={"church": 2.0})}, "no strength to choose; leave it out"),
        ({"prompts": "a", "tighten": Tightening(alpha_scales={"church": float("nan")})}, "expected a finite number"),
        ({"prompts": "a", "tighten": Tightening(enabled=("cathedral",))}, "unknown concept 'cathedral'"),
        ({"prompts": "a", "tighten": Tightening(enabled="church")}, "enabled is 'church'; expected a tuple"),
        ({"prompts": "a", "tighten": Tightening(thresholds={"church": "0"})}, "thresholds of 'church' is '0'"),
        ({"prompts": "a", "tighten": {"enabled": ("church",)}}, "tighten is dict; expected a Tightening"),
    ],
)
def test_bad_request_is_one_clear_line(pipeline: Pipeline, options: dict[str, object], message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        pipeline(**options)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (SafetyPolicy(enabled=("nothing",)), "unknown concept 'nothing'"),
        (SafetyPolicy(enabled=("",)), "unknown concept ''"),
        (SafetyPolicy(enabled=(None,)), "unknown concept None"),  # type: ignore[arg-type]
        (SafetyPolicy(enabled="church"), "enabled is 'church'; expected a tuple of concepts"),
        (SafetyPolicy(enabled=3), "enabled is 3; expected a tuple"),  # type: ignore[arg-type]
        (SafetyPolicy(enabled=()), "enabled is empty, and looking for nothing is not protection"),
        (SafetyPolicy(enabled=[]), "set unprotected to draw without"),
        (SafetyPolicy(thresholds={"churches": 0.5}), "unknown concept 'churches'"),
        (SafetyPolicy(thresholds={1: 0.5}), "unknown concept 1"),  # type: ignore[dict-item]
        (SafetyPolicy(thresholds=[("church", 0.5)]), "thresholds is .*expected a mapping"),  # type: ignore[arg-type]
        (SafetyPolicy(thresholds={"church": "0.5"}), "thresholds of 'church' is '0.5'"),  # type: ignore[dict-item]
        (SafetyPolicy(thresholds={"church": True}), "thresholds of 'church' is True"),
        (SafetyPolicy(thresholds={"church": float("nan")}), "thresholds of 'church' is nan"),
        (SafetyPolicy(alpha_scales={"church": 1e39}), r"alpha_scales of 'church' is 1e\+39; expected a finite number"),
        (SafetyPolicy(thresholds={"church": -(10**400)}), "expected a finite number"),
        (SafetyPolicy(cooldown="2"), "cooldown is '2'"),  # type: ignore[arg-type]
        (SafetyPolicy(cooldown=True), "cooldown is True"),
        (SafetyPolicy(cooldown=2.0), "cooldown is 2.0"),  # type: ignore[arg-type]
        (SafetyPolicy(unprotected=1), "unprotected is 1"),  # type: ignore[arg-type]
        (SafetyPolicy(unprotected=True, enabled=("church",)), "leave everything else out"),
        ({"enabled": ("church",)}, "policy is dict; expected a SafetyPolicy"),
        (SafetyPolicy(thresholds={"church": float("inf")}), "threshold"),
        (SafetyPolicy(thresholds={"church": 1.5}), "threshold"),
        (SafetyPolicy(alpha_scales={"church": 0.0}), "alpha_scale"),
        (SafetyPolicy(cooldown=-1), "cooldown"),
    ],
)
def test_bad_policy_is_refused(pipeline: Pipeline, policy: SafetyPolicy, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        resolve(policy, pipeline.manifest.safety)


def test_request_can_tighten(pipeline: Pipeline) -> None:
    loose = resolve(SafetyPolicy(enabled=("ink",), thresholds={"church": 0.9}), pipeline.manifest.safety)
    tight = loose.tightened(Tightening(enabled=("church",), thresholds={"church": 0.1}))
    assert tight.enabled.tolist() == [name in ("church", "ink") for name in tight.concepts]
    assert float(tight.threshold[0]) == pytest.approx(0.1)
    assert loose.enabled.tolist() == [name == "ink" for name in loose.concepts]


def test_weakening_is_logged(pipeline: Pipeline, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="saferedir"):
        resolve(SafetyPolicy(unprotected=True), pipeline.manifest.safety)
        resolve(SafetyPolicy(enabled={"ink"}), pipeline.manifest.safety)
    assert "switched OFF" in caplog.text
    assert "does not look for: church" in caplog.text


def test_a_request_cannot_tighten_what_is_unprotected(unprotected: Pipeline) -> None:
    with pytest.raises(RequestError, match="nothing that a request can tighten"):
        unprotected("a cat", num_inference_steps=1, tighten=Tightening(enabled=("church",)))


@pytest.mark.parametrize(("seed", "used"), [(np.int64(3), 3), (np.array([3]), 3), (-1, 2**32 - 1), ([2**32 + 3], 3)])
def test_the_record_states_the_seed_that_draws_the_same_again(pipeline: Pipeline, seed: Any, used: int) -> None:
    drawn = pipeline("a cat", seed=seed, num_inference_steps=1)
    assert drawn.records[0].seed == used
    assert pipeline("a cat", seed=used, num_inference_steps=1).images[0].tobytes() == drawn.images[0].tobytes()


def test_without_a_seed_it_is_random_and_the_record_says_which(pipeline: Pipeline) -> None:
    one, other = (pipeline("a cat", seed=None, num_images_per_prompt=2, num_inference_steps=1) for _ in range(2))
    first, second = one.records[0].seed, one.records[1].seed
    assert second == (first + 1) % 2**32
    assert other.records[0].seed != first
    again = pipeline("a cat", seed=first, num_inference_steps=1)
    assert again.images[0].tobytes() == pipeline("a cat", seed=[first], num_inference_steps=1).images[0].tobytes()
    assert np.abs(np.asarray(again.images[0], int) - np.asarray(one.images[0], int)).max() <= 1  # of a batch of two


def test_empty_prompt_is_a_prompt(pipeline: Pipeline) -> None:
    assert len(pipeline("", num_inference_steps=2).images) == 1


def test_long_prompt_is_cut_and_counted(pipeline: Pipeline) -> None:
    record = pipeline("cat " * 200, num_inference_steps=2).records[0]
    assert record.tokens_cut == 200 + 2 - 77
    assert len(record.tokens) == 77


def test_a_model_that_is_told_its_guidance_rescales_nothing() -> None:
    told = structs.replace(MODEL, told_guidance=True)
    assert check_rescale(told, 0.0, 8.0) == 0
    assert check_rescale(MODEL, 0.7, 8.0) == 0.7
    with pytest.raises(RequestError, match=r"guidance_rescale is 0\.7, but with a model that is told its guidance"):
        check_rescale(told, 0.7, 8.0)
