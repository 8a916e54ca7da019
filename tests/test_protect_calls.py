"""What a call of a protected pipeline brings with it: callbacks, embeddings, its own encode_prompt, another scheduler."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, EulerAncestralDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from eager_draw import SAFE, STEPS, draw

from saferedir.engines.errors import RequestError, SafetyError, SafetyMismatchError
from saferedir_torch.protect import protect
from saferedir_torch.safety_module import SafetyModule


def test_a_users_own_encode_prompt_is_used_and_kept(pipe: Any, safety: SafetyModule) -> None:
    theirs, read = pipe.encode_prompt, list[str]()

    def own(prompt: Any, *args: Any, **kwargs: Any) -> Any:
        read.append(prompt)
        return theirs("a church", *args, **kwargs)

    pipe.encode_prompt = own
    with protect(pipe, safety):
        drawn = draw(pipe, "\N{CYRILLIC SMALL LETTER A}\u200b cat")
        assert drawn.safety.fired[0, 0, 0]
        assert pipe.encode_prompt is own
    assert read == ["a cat"]
    assert vars(pipe)["encode_prompt"] is own


def switched_off_at(step: int) -> Callable[..., Any]:
    """As the documentation of diffusers has it."""

    def dynamic_guidance(pipe: Any, index: int, _: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if index == step:
            tensors["prompt_embeds"] = tensors["prompt_embeds"].chunk(2)[-1]
            pipe._guidance_scale = 0.0
        return tensors

    return dynamic_guidance


def test_guidance_that_a_callback_switches_off_is_followed(pipe: Any, safety: SafetyModule) -> None:
    options: dict[str, Any] = {
        "num_inference_steps": 4, "callback_on_step_end": switched_off_at(1),
        "callback_on_step_end_tensor_inputs": ["prompt_embeds"],
    }  # fmt: skip
    plain = draw(pipe, SAFE, **options).images
    with protect(pipe, safety):
        safe, unsafe = draw(pipe, SAFE, **options), draw(pipe, **options)
        guided = draw(pipe, num_inference_steps=4)
    assert np.array_equal(safe.images, plain)
    assert len(unsafe.safety.timesteps) == 4
    assert torch.equal(unsafe.safety.scores[:2], guided.safety.scores[:2])
    assert not np.array_equal(unsafe.images, guided.images)


def test_a_prompt_that_a_callback_changes_is_refused(pipe: Any, safety: SafetyModule) -> None:
    def other(_: Any, __: int, ___: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        return {"prompt_embeds": tensors["prompt_embeds"].flip(0)}

    with protect(pipe, safety), pytest.raises(SafetyError, match="a callback changed the prompt"):
        draw(pipe, callback_on_step_end=other, callback_on_step_end_tensor_inputs=["prompt_embeds"])


def test_a_run_that_a_callback_interrupts_has_the_record_of_its_steps(pipe: Any, safety: SafetyModule) -> None:
    def interrupt(pipe: Any, _: int, __: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = True
        return tensors

    with protect(pipe, safety):
        assert len(draw(pipe, num_inference_steps=4, callback_on_step_end=interrupt).safety.timesteps) == 1


@pytest.mark.parametrize("tokens", [154, 76])
def test_embeddings_of_another_length_name_the_right_one(pipe: Any, safety: SafetyModule, tokens: int) -> None:
    with protect(pipe, safety), pytest.raises(RequestError, match=rf"prompt_embeds are .*{tokens}.*; expected 77 tokens"):
        pipe(prompt_embeds=torch.zeros(1, tokens, 128), num_inference_steps=STEPS)


def test_embeddings_of_another_length_from_a_users_encode_prompt_are_refused(pipe: Any, safety: SafetyModule) -> None:
    pipe.encode_prompt = lambda *_, **__: (torch.zeros(1, 154, 128), torch.zeros(1, 154, 128))
    with protect(pipe, safety), pytest.raises(RequestError, match="expected 77 tokens of width 128"):
        draw(pipe)


def test_skipped_layers_are_refused(pipe: Any, safety: SafetyModule) -> None:
    with protect(pipe, safety), pytest.raises(SafetyError, match="clip_skip gives other embeddings"):
        draw(pipe, clip_skip=1)


def test_the_scheduler_may_be_replaced_between_calls(pipe: Any, safety: SafetyModule) -> None:
    config = pipe.scheduler.config
    with protect(pipe, safety):
        draw(pipe)
        for kind in (DPMSolverMultistepScheduler, EulerAncestralDiscreteScheduler):
            pipe.scheduler = kind.from_config(config)
            inside = draw(pipe, SAFE, num_inference_steps=3).images
            with protect(other := copy.copy(pipe), safety):
                assert np.array_equal(draw(other, SAFE, num_inference_steps=3).images, inside)
        pipe.scheduler = FlowMatchEulerDiscreteScheduler()
        with pytest.raises(SafetyMismatchError, match="noise level: FlowMatchEulerDiscreteScheduler states no alphas_cumprod"):
            draw(pipe)
        assert type(pipe.scheduler) is FlowMatchEulerDiscreteScheduler


def test_a_method_that_somebody_replaced_on_the_scheduler_is_called(pipe: Any, safety: SafetyModule) -> None:
    """A scheduler with a method of its own is not copied, which the copy would call on the original."""
    step, called = pipe.scheduler.step, []

    def counting(*args: Any, **kwargs: Any) -> Any:
        called.append(args)
        return step(*args, **kwargs)

    with protect(pipe, safety):
        expected = draw(pipe, SAFE, num_inference_steps=4)
        pipe.scheduler.step = counting
        found = draw(pipe, SAFE, num_inference_steps=4)
    del pipe.scheduler.step
    assert len(called) == 4
    assert torch.equal(found.safety.scores, expected.safety.scores)


def test_what_changed_in_the_text_encoder_is_noticed_before_the_next_call(pipe: Any, safety: SafetyModule) -> None:
    pipe.text_encoder = copy.deepcopy(pipe.text_encoder)
    with protect(pipe, safety):
        draw(pipe)
        next(pipe.text_encoder.encoder.layers[0].parameters()).data += 1e-3  # as fusing a LoRA does
        with pytest.raises(SafetyMismatchError, match="text encoder"):
            draw(pipe)
