"""Protected pipelines as services use them: shared weights and schedulers, threads, tasks, copies, nested contexts."""

from __future__ import annotations

import asyncio
import copy
import gc
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline
from eager_draw import SAFE, STEPS, UNSAFE, draw
from PIL import Image

from saferedir.engines.errors import SafetyError
from saferedir_torch.protect import EagerPolicy, protect
from saferedir_torch.safety_module import SafetyModule


@pytest.fixture
def from_image(pipe: Any) -> Any:
    """Image to image, with the same components."""
    sibling = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    sibling.set_progress_bar_config(disable=True)
    return sibling


class Facts(NamedTuple):
    """What must be after a context as it was before."""

    kinds: list[type]
    attributes: dict[str, Any]
    hooks: list[Any]

    @classmethod
    def of(cls, pipe: Any) -> Facts:
        unet = pipe.unet
        kinds = ("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks", "_forward_hooks_with_kwargs")
        attributes = {name: value for name, value in vars(pipe).items() if name in ("scheduler", "encode_prompt", "unet")}
        return cls([type(pipe), type(pipe.tokenizer)], attributes, [dict(getattr(unet, kind)) for kind in kinds])


def picture(seed: int) -> Image.Image:
    return Image.new("RGB", (64, 64), (40 * seed, 90, 200 - 30 * seed))


def draw_from_image(pipe: Any, prompt: str = UNSAFE, seed: int = 1, **options: Any) -> Any:
    return draw(pipe, prompt, seed, image=picture(seed), strength=0.9, num_inference_steps=3, **options)


def same(a: Any, b: Any) -> bool:
    """Whether two results are the same picture and record."""
    return np.array_equal(a.images, b.images) and torch.equal(a.safety.scores, b.safety.scores)


def test_a_pipeline_that_shares_the_unet_is_refused_until_it_is_protected_too(
    pipe: Any, from_image: Any, safety: SafetyModule
) -> None:
    plain = draw_from_image(from_image, SAFE).images
    with protect(pipe, safety):
        before = draw(pipe)
        with pytest.raises(SafetyError, match="UNet2DConditionModel was called without a prompt of a protected pipeline"):
            draw_from_image(from_image, SAFE)
        with protect(from_image, safety):
            drawn = draw_from_image(from_image, SAFE)
            assert np.array_equal(drawn.images, plain) and not drawn.safety.fired.any()
            assert draw_from_image(from_image).safety.fired[0, 0, 0]
        assert same(draw(pipe), before)
    assert before.safety.fired[0, 0, 0]
    assert np.array_equal(draw_from_image(from_image, SAFE).images, plain)


def test_a_pipeline_called_within_a_call_is_followed_if_protected_and_refused_if_not(
    pipe: Any, from_image: Any, safety: SafetyModule
) -> None:
    drawn: list[Any] = []

    def within(_: Any, __: int, ___: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        drawn.append(draw_from_image(from_image, SAFE))
        return tensors

    with protect(pipe, safety):
        alone = draw(pipe)
        with pytest.raises(SafetyError, match="other embeddings than its call began with"):
            draw(pipe, callback_on_step_end=within)
        with protect(from_image, safety):
            outer = draw(pipe, callback_on_step_end=within)
    assert same(outer, alone)
    assert len(drawn) == STEPS and not drawn[0].safety.fired.any()


@pytest.mark.parametrize("fails", [False, True])
def test_nested_contexts_of_one_pipeline_leave_it_as_it_was(pipe: Any, safety: SafetyModule, fails: bool) -> None:
    before = Facts.of(pipe)
    plain = draw(pipe).images

    def nested() -> None:
        with protect(pipe, safety) as outer:
            with protect(pipe, safety, EagerPolicy(enabled=("ink",))) as inner:
                assert not draw(pipe).safety.fired.any()
            assert draw(pipe).safety.fired.any()
            assert (inner.last.policy.enabled, outer.last.policy.enabled[0]) == (("ink",), "church")
            if fails:
                raise KeyError

    if fails:
        with pytest.raises(KeyError):
            nested()
    else:
        nested()
    assert Facts.of(pipe) == before
    assert np.array_equal(draw(pipe).images, plain)


def test_a_call_that_fails_leaves_nothing_behind(pipe: Any, safety: SafetyModule) -> None:
    before = Facts.of(pipe)

    def stop(*_: Any) -> None:
        raise KeyError

    with protect(pipe, safety) as guard:
        inside = Facts.of(pipe)
        with pytest.raises(KeyError):
            draw(pipe, callback_on_step_end=stop)
        assert Facts.of(pipe) == inside
        with pytest.raises(SafetyError, match="nothing was drawn yet"):
            _ = guard.last
        with pytest.raises(SafetyError, match="without a prompt of a protected pipeline"):
            pipe.unet(torch.zeros(1, 4, 16, 16), 1, torch.zeros(1, 77, 128))
    assert Facts.of(pipe) == before


def test_contexts_leave_no_classes_behind(pipe: Any, safety: SafetyModule) -> None:
    gc.collect()
    before = len(type(pipe).__subclasses__())
    for _ in range(20):
        with protect(pipe, safety):
            pass
    gc.collect()
    assert len(type(pipe).__subclasses__()) == before


def test_contexts_that_overlap_leave_the_pipeline_as_it_was(pipe: Any, safety: SafetyModule) -> None:
    """As threads do that protect one pipeline each for a request: the first to come is the first to go."""
    before = Facts.of(pipe)
    first, second = protect(pipe, safety), protect(pipe, safety)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert draw(pipe).safety.fired.any()
    second.__exit__(None, None, None)
    assert Facts.of(pipe) == before


def test_a_thread_that_entered_no_context_needs_those_open_to_be_alike(pipe: Any, safety: SafetyModule) -> None:
    with ThreadPoolExecutor(1) as pool, protect(pipe, safety, EagerPolicy(enabled=("church",))):
        assert pool.submit(draw, pipe).result().safety.policy.enabled == ("church",)
        with protect(pipe, safety, EagerPolicy(enabled=("church",))):
            assert pool.submit(draw, pipe).result().safety.policy.enabled == ("church",)
        with protect(pipe, safety), pytest.raises(SafetyError, match="2 protections of this pipeline are open that differ"):
            pool.submit(draw, pipe).result()


def test_a_copy_is_protected_as_long_as_its_original(pipe: Any, safety: SafetyModule) -> None:
    with protect(pipe, safety):
        expected = draw(pipe)
        copies = [copy.copy(pipe), copy.deepcopy(pipe), type(pipe)(**pipe.components, requires_safety_checker=False)]
        assert all(same(draw(other), expected) for other in copies)
    for other in copies:
        with pytest.raises(SafetyError, match="the protection that this copy of a pipeline was made under has ended"):
            draw(other)
    assert not np.array_equal(draw(pipe).images, expected.images)
    assert not hasattr(draw(pipe), "safety")


def test_a_copy_can_be_protected_by_itself(pipe: Any, safety: SafetyModule) -> None:
    with protect(pipe, safety):
        other = copy.copy(pipe)
        with protect(other, safety, EagerPolicy(enabled=("ink",))):
            assert draw(other).safety.policy.enabled == ("ink",)
            assert draw(pipe).safety.policy.enabled == ("church", "ink", "weapons")
        assert draw(other).safety.policy.enabled == ("church", "ink", "weapons")


def test_a_call_goes_on_under_protection_when_its_context_ends(pipe: Any, safety: SafetyModule) -> None:
    before = Facts.of(pipe)
    context = protect(pipe, safety)
    context.__enter__()
    expected = draw(pipe)

    def leave(_: Any, step: int, __: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step == 0:
            context.__exit__(None, None, None)
        return tensors

    assert same(draw(pipe, callback_on_step_end=leave), expected)
    assert Facts.of(pipe) == before


@pytest.mark.parametrize("return_dict", [True, False])
def test_what_fired_travels_with_the_result(pipe: Any, safety: SafetyModule, return_dict: bool) -> None:
    async def ask() -> list[Any]:
        return await asyncio.gather(
            *(asyncio.to_thread(draw, pipe, prompt, seed, return_dict=return_dict)
              for seed, prompt in enumerate([UNSAFE, SAFE] * 2))
        )  # fmt: skip

    with protect(pipe, safety, EagerPolicy(thresholds={"church": 0.4}, cooldown=1)) as guard:
        results = asyncio.run(ask())
        with pytest.raises(SafetyError, match="a result's `safety` is its record"):
            _ = guard.last
    assert [bool(result.safety.fired.any()) for result in results] == [True, False, True, False]
    policy = results[0].safety.policy
    assert (policy.thresholds["church"], policy.thresholds["ink"], policy.cooldown) == (0.4, 0.5, 1)
    images, _ = results[1] if not return_dict else (results[1].images, None)
    with protect(pipe, safety):
        assert np.array_equal(images, draw(pipe, SAFE, 1).images)


def test_tasks_that_protect_one_pipeline_each_keep_to_their_own(pipe: Any, safety: SafetyModule) -> None:
    before = Facts.of(pipe)

    async def request(concept: str) -> tuple[str, ...]:
        with protect(pipe, safety, EagerPolicy(enabled=(concept,))) as guard:
            await asyncio.sleep(0)
            await asyncio.to_thread(draw, pipe)
            draw(pipe)
            await asyncio.sleep(0)
            return guard.last.policy.enabled

    async def all_requests() -> list[tuple[str, ...]]:
        return await asyncio.gather(*(request(concept) for concept in ("church", "ink", "weapons")))

    assert asyncio.run(all_requests()) == [("church",), ("ink",), ("weapons",)]
    assert Facts.of(pipe) == before


def test_threads_that_share_a_tokenizer_read_as_each_alone(pipe: Any, safety: SafetyModule) -> None:
    """Also where nobody protects the pipeline that reads beside a protected one."""
    other, wrong = copy.copy(pipe), list[Any]()

    def read(by: Any, words: int) -> None:
        for _ in range(100):
            ids = by.tokenizer("a cat " * words, padding="max_length", max_length=77, truncation=True).input_ids
            if len(ids) != 77:
                wrong.append(ids)
            by.tokenizer("a cat " * words, padding="longest")

    with protect(pipe, safety):
        threads = [threading.Thread(target=read, args=(by, words)) for words in (1, 50) for by in (pipe, other) * 2]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []


def serve(threads: int, calls: int, prompts: list[str], pipe: Any, safety: SafetyModule) -> None:
    """Every picture and record of `threads` that make `calls` each equals its lone run; what is not protected is refused."""
    kinds: list[tuple[Any, Callable[..., Any]]] = [
        (pipe, draw),
        (StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False), draw_from_image),
        (copy.copy(pipe), draw),
        (StableDiffusionImg2ImgPipeline.from_pipe(pipe, scheduler=copy.copy(pipe.scheduler)), draw_from_image),
    ]
    unprotected = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    for other, _ in (*kinds, (unprotected, draw)):
        other.set_progress_bar_config(disable=True)
    before = [Facts.of(other) for other, _ in kinds]
    jobs = [(kind, prompt, seed) for kind in range(4) for seed, prompt in enumerate(prompts)]

    def run(kind: int, prompt: str, seed: int) -> Any:
        other, how = kinds[kind]
        if kind == 2:
            other = copy.copy(other)  # per request
        return how(other, prompt, seed, guidance_scale=(5.0, 1.0, 3.0, 5.0)[seed])

    def call(number: int) -> bool:
        if number % 8 == 7:
            with pytest.raises(SafetyError, match="without a prompt of a protected pipeline"):
                draw_from_image(unprotected, SAFE)
        own = jobs[number % len(jobs)]
        if number % 3 == 0:
            with protect(kinds[own[0]][0], safety):
                return same(run(*own), alone[own])
        return same(run(*own), alone[own])

    guards = [protect(other, safety) for other, _ in kinds]
    for guard in guards:
        guard.__enter__()
    try:
        alone = {job: run(*job) for job in jobs}
        assert [alone[job].safety.fired.any() for job in jobs if job[0] == 0] == [True, False] * (len(prompts) // 2)
        wrong: list[int] = []
        barrier = threading.Barrier(threads)

        def work(thread: int) -> None:
            barrier.wait()
            wrong.extend(number for number in range(thread, threads * calls, threads) if not call(number * 5))

        with ThreadPoolExecutor(threads) as pool:
            for done in [pool.submit(work, thread) for thread in range(threads)]:
                done.result()
        assert wrong == []
    finally:
        for guard in guards:
            guard.__exit__(None, None, None)
    assert [Facts.of(other) for other, _ in kinds] == before


def test_four_threads_over_shared_weights_draw_as_each_alone(pipe: Any, safety: SafetyModule) -> None:
    serve(4, 4, [UNSAFE, SAFE], pipe, safety)


@pytest.mark.slow
def test_eight_threads_over_shared_weights_draw_as_each_alone(pipe: Any, safety: SafetyModule) -> None:
    serve(8, 20, [UNSAFE, SAFE, "a minster", "a cat"], pipe, safety)
