"""The runtime draws: batches, threads, cancellation, embeddings, guidance, records."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from PIL import Image

from saferedir.engines.errors import CancelledError
from saferedir.runtime import LookedFor, Pipeline, SafetyPolicy, Tightening
from saferedir.runtime import prompts as prompts_module
from saferedir.runtime.backends import make_backend
from saferedir.runtime.pipeline import Generation

STEPS = 6


def pixels(image: Image.Image) -> np.ndarray[tuple[int, ...], np.dtype[np.int16]]:
    return np.asarray(image).astype(np.int16)


def assert_same_picture(a: Image.Image, b: Image.Image) -> None:
    """Equal within 1/255 on 99.9 % of pixels."""
    assert (np.abs(pixels(a) - pixels(b)) > 1).mean() <= 1e-3


MIXED = [
    ("a church", 3), ("a cat", 4), ("an abbey next to a dog", 5), ("", 6),
    ("a castle in ink style", 7), ("a church in sepia style", 8), ("a rocket, no church", 9), ("a basilica", 10),
]  # fmt: skip


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_a_picture_alone_is_that_in_any_company_to_the_bit(pipeline: Pipeline, threads: int, guidance: float) -> None:
    own = Pipeline(pipeline.bundle, make_backend(pipeline.bundle, "ort-cpu", threads=threads))

    def drawn(chosen: list[tuple[str, int]]) -> Generation:
        prompts, seeds = [prompt for prompt, _ in chosen], [seed for _, seed in chosen]
        return own(
            prompts, seed=seeds, num_inference_steps=4, guidance_scale=guidance, guidance_rescale=0.5 * (guidance > 1),
            scheduler="euler-ancestral",
        )  # fmt: skip

    companies = [MIXED[:7], MIXED[:3], [MIXED[4], MIXED[2]]]
    together = [(company, drawn(company)) for company in companies]
    for each in MIXED[:3]:
        alone = drawn([each])
        for company, other in together:
            if each in company:
                place = company.index(each)
                assert other.records[place].steps == alone.records[0].steps
                assert np.array_equal(pixels(other.images[place]), pixels(alone.images[0]))


def test_batch_above_the_maximum_is_split(pipeline: Pipeline) -> None:
    count = pipeline.manifest.max_batch + 1
    many = pipeline("a cat", num_images_per_prompt=count, seed=0, num_inference_steps=2)
    assert [record.seed for record in many.records] == list(range(count))
    assert_same_picture(many.images[-1], pipeline("a cat", seed=count - 1, num_inference_steps=2).images[0])


def test_threads_do_not_touch_each_other(pipeline: Pipeline) -> None:
    alone = [pipeline(prompt, seed=seed, num_inference_steps=STEPS) for prompt, seed in MIXED[:4]]
    with ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(pipeline, prompt, seed=seed, num_inference_steps=STEPS) for prompt, seed in MIXED[:4]]
        for expected, future in zip(alone, futures, strict=True):
            found = future.result()
            assert np.array_equal(pixels(expected.images[0]), pixels(found.images[0]))
            assert expected.records[0].steps == found.records[0].steps


@pytest.mark.parametrize("guidance", [0.0, 1.0, 5.0])
def test_untouched_pictures_are_bit_identical(pipeline: Pipeline, unprotected: Pipeline, guidance: float) -> None:
    prompts = ["a cat", "a dog beside a balloon as a sticker", "a pizza in sepia style"]
    safe = pipeline(prompts, seed=1, num_inference_steps=STEPS, guidance_scale=guidance)
    plain = unprotected(prompts, seed=1, num_inference_steps=STEPS, guidance_scale=guidance)
    assert not any(record.fired for record in safe.records)
    for a, b in zip(safe.images, plain.images, strict=True):
        assert a.tobytes() == b.tobytes()


def test_unprotected_says_so(unprotected: Pipeline) -> None:
    record = unprotected("a church", num_inference_steps=2).records[0]
    assert not record.protected
    assert record.steps == ()
    assert record.looked_for == {}
    assert record.cooldown is None


def test_a_record_states_what_was_looked_for_and_how_it_was_drawn(pipeline: Pipeline) -> None:
    policy = SafetyPolicy(enabled=("ink",), thresholds={"ink": 0.25}, cooldown=4, beyond_promise=True)
    looking = Pipeline(pipeline.bundle, pipeline.backend, policy)
    tighten = Tightening(enabled=("church",), thresholds={"ink": 0.125})
    record = looking(
        "a cat", seed=5, num_inference_steps=2, guidance_scale=3, guidance_rescale=0.5, scheduler="euler", tighten=tighten
    ).records[0]
    church = next(concept for concept in pipeline.manifest.safety.concepts if concept.name == "church")
    assert record.looked_for["ink"] == LookedFor(0.125, None)
    assert record.looked_for["church"] == LookedFor(pytest.approx(church.threshold), None)
    assert set(record.looked_for) == {"church", "ink"}
    assert record.protected
    assert (record.cooldown, record.seed, record.num_inference_steps, record.guidance_scale) == (0, 5, 2, 3.0)
    assert record.guidance_rescale == 0.5
    assert (record.scheduler, record.height, record.width, record.negative_prompt) == ("euler", 64, 64, "none")
    assert json.loads(json.dumps(record.to_dict()))["looked_for"]["ink"] == {"threshold": 0.125, "alpha_scale": None}
    assert pipeline("a cat", num_inference_steps=1).records[0].scheduler == "ddim"


def test_a_negative_prompt_that_guidance_ignores_is_said(pipeline: Pipeline, caplog: pytest.LogCaptureFixture) -> None:
    ignored = pipeline("a cat", negative_prompt="a dog", guidance_scale=1.0, num_inference_steps=1)
    assert ignored.records[0].negative_prompt == "ignored"
    assert "the negative prompt is ignored: guidance_scale is 1" in caplog.text
    assert pipeline("a cat", negative_prompt="a dog", num_inference_steps=1).records[0].negative_prompt == "given"


def test_each_distinct_prompt_is_read_and_encoded_once(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    encoded: list[int] = []
    letters, encode = prompts_module.in_plain_letters, pipeline._encode

    def reading(prompt: str) -> str:
        read.append(prompt)
        return letters(prompt)

    def encoding(ids: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        encoded.append(len(ids))
        return encode(ids)

    monkeypatch.setattr(prompts_module, "in_plain_letters", reading)
    monkeypatch.setattr(pipeline, "_encode", encoding)
    count = pipeline.manifest.max_batch
    drawn = pipeline(["a cat", "a dog"], num_images_per_prompt=count, num_inference_steps=1)
    assert sorted(read) == ["a cat", "a dog"]
    assert encoded == [2, 1]  # the first prompt with the empty one, then the second alone
    assert [record.prompt for record in drawn.records] == ["a cat"] * count + ["a dog"] * count


def test_redirection_changes_the_picture(always_fires: Pipeline, unprotected: Pipeline) -> None:
    safe = always_fires("a church", seed=2, num_inference_steps=STEPS)
    plain = unprotected("a church", seed=2, num_inference_steps=STEPS)
    assert safe.images[0].tobytes() != plain.images[0].tobytes()


@pytest.mark.parametrize("period", [0, 1, 2, 5])
def test_cooldown_counts_down(pipeline: Pipeline, period: int) -> None:
    eager = Pipeline(pipeline.bundle, pipeline.backend, SafetyPolicy(thresholds={"church": 0.0}, cooldown=period))
    steps = eager("a church", num_inference_steps=12).records[0].steps
    assert [bool(step.fired) for step in steps] == [index % (period + 1) == 0 for index in range(12)]
    assert [step.cooldown for step in steps] == [period - index % (period + 1) for index in range(12)]


def test_embeddings_are_protected_alike(pipeline: Pipeline) -> None:
    embeds = pipeline.encode(["a church"])
    by_text = pipeline("a church", seed=5, num_inference_steps=STEPS)
    by_embedding = pipeline(prompt_embeds=embeds, seed=5, num_inference_steps=STEPS)
    assert by_text.images[0].tobytes() == by_embedding.images[0].tobytes()
    assert by_embedding.records[0].prompt is None
    assert by_embedding.records[0].steps == by_text.records[0].steps


def test_negative_prompt_and_its_embedding_agree(pipeline: Pipeline) -> None:
    text = pipeline("a cat", negative_prompt="a dog", num_inference_steps=2)
    embedding = pipeline("a cat", negative_prompt_embeds=pipeline.encode(["a dog"]), num_inference_steps=2)
    without = pipeline("a cat", num_inference_steps=2)
    assert text.images[0].tobytes() == embedding.images[0].tobytes()
    assert text.images[0].tobytes() != without.images[0].tobytes()


def test_record_is_complete(always_fires: Pipeline) -> None:
    record = always_fires("a church next to a cat", num_inference_steps=3).records[0]
    assert record.tokens[:3] == ("<|startoftext|>", "a</w>", "church</w>")
    assert len(record.token_mask["church"]) == 77
    assert {
        "bundle",
        "saferedir",
        "backend",
        "bundle.json sha256",
        "safety.safetensors sha256",
        "step.onnx sha256",
    } <= record.versions.keys()
    assert record.to_dict()["fired"] is True


def test_tightening_makes_it_fire(pipeline: Pipeline) -> None:
    tight = pipeline("a cat", num_inference_steps=3, tighten=Tightening(thresholds={"church": 0.0}))
    assert tight.records[0].fired


def test_callback_counts_every_step(pipeline: Pipeline) -> None:
    seen: list[tuple[int, int]] = []
    pipeline("a cat", num_inference_steps=4, on_step=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_cancellation_ends_between_steps(pipeline: Pipeline) -> None:
    cancel = threading.Event()
    with pytest.raises(CancelledError, match="after 2 of 6"):
        pipeline("a cat", num_inference_steps=6, cancel=cancel, on_step=lambda done, _: cancel.set() if done == 2 else None)
