"""Options are checked before anything is computed; a request may only tighten the operator's policy."""

from __future__ import annotations

import logging

import numpy as np
import pytest

from saferedir.engines.errors import RequestError
from saferedir.runtime import Pipeline, SafetyPolicy, Tightening
from saferedir.runtime.policy import resolve

WIDTH = (77, 128)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "either prompts or prompt_embeds"),
        ({"prompts": []}, "prompts is empty"),
        ({"prompts": "a", "num_images_per_prompt": 0}, "num_images_per_prompt is 0"),
        ({"prompts": "a", "seed": -1}, "seed is -1"),
        ({"prompts": "a", "seed": 2**32}, "seed is 4294967296"),
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
        ({"prompts": "a", "guidance_scale": "much"}, "guidance_scale is 'much'"),
        ({"prompt_embeds": [["a"]]}, "no array of numbers"),
        ({"prompts": ["a", "b"], "negative_prompt": ["c"]}, "negative_prompt holds 1 texts for 2"),
        ({"prompt_embeds": np.zeros((1, 77, 64))}, r"\(1, 77, 64\)"),
        ({"prompt_embeds": np.full((1, *WIDTH), np.nan)}, "NaN"),
        ({"prompts": "a", "negative_prompt": "b", "negative_prompt_embeds": np.zeros((1, *WIDTH))}, "not both"),
        ({"prompts": ["a", "b"], "negative_prompt_embeds": np.zeros((3, *WIDTH))}, "holds 3 embeddings"),
        ({"prompts": "a", "tighten": Tightening(thresholds={"church": 1.0})}, "only lower"),
        ({"prompts": "a", "tighten": Tightening(thresholds={"church": float("-inf")})}, "only lower"),
        ({"prompts": "a", "tighten": Tightening(alpha_scales={"church": 0.0})}, "only raise"),
        ({"prompts": "a", "tighten": Tightening(alpha_scales={"church": float("nan")})}, "only raise"),
        ({"prompts": "a", "tighten": Tightening(enabled=("cathedral",))}, "unknown concept 'cathedral'"),
    ],
)
def test_bad_request_is_one_clear_line(pipeline: Pipeline, options: dict[str, object], message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        pipeline(**options)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (SafetyPolicy(enabled=("nothing",)), "unknown concept"),
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
    loose = resolve(SafetyPolicy(enabled=(), thresholds={"church": 0.9}), pipeline.manifest.safety)
    tight = loose.tightened(Tightening(enabled=("church",), thresholds={"church": 0.1}, alpha_scales={"church": 2.0}))
    assert tight.enabled.tolist() == [name == "church" for name in tight.concepts]
    assert float(tight.threshold[0]) == pytest.approx(0.1)
    assert float(tight.alpha_scale[0]) == pytest.approx(2.0)
    assert not loose.enabled.any()


def test_weakening_is_logged(pipeline: Pipeline, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="saferedir"):
        resolve(SafetyPolicy(unprotected=True), pipeline.manifest.safety)
        resolve(SafetyPolicy(enabled=()), pipeline.manifest.safety)
    assert "switched OFF" in caplog.text
    assert "does not look for: church" in caplog.text


def test_seeds_of_numpy_are_seeds(pipeline: Pipeline) -> None:
    one = pipeline("a cat", seed=np.int64(3), num_inference_steps=2)
    many = pipeline("a cat", seed=np.array([3]), num_inference_steps=2)
    assert one.records[0].seed == many.records[0].seed == 3
    assert one.images[0].tobytes() == many.images[0].tobytes()


def test_empty_prompt_is_a_prompt(pipeline: Pipeline) -> None:
    assert len(pipeline("", num_inference_steps=2).images) == 1


def test_long_prompt_is_cut_and_counted(pipeline: Pipeline) -> None:
    record = pipeline("cat " * 200, num_inference_steps=2).records[0]
    assert record.tokens_cut == 200 + 2 - 77
    assert len(record.tokens) == 77
