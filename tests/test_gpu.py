"""What needs an NVIDIA GPU, `make test-gpu`: every backend that can be had there equals the CPU's, pictures and all."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from saferedir.engines import open_bundle
from saferedir.engines.bundle import DEFAULT_BUNDLE
from saferedir.engines.errors import NonFiniteError, RequestError
from saferedir.engines.plan_cache import PlanCache, user_cache
from saferedir.export.plan_builder import PlanOptions, build_plans
from saferedir.runtime import Pipeline
from saferedir.runtime.cuda import CudaStream
from saferedir.runtime.doctor import diagnose
from saferedir.runtime.rows import ladder
from saferedir.runtime.tensorrt import MODULES, TensorRtBackend
from saferedir.runtime.verify import verify_bundle

pytestmark = pytest.mark.gpu
GPU_BACKENDS = ("ort-cuda", "ort-tensorrt", "ort-tensorrt-rtx", "tensorrt-rtx", "tensorrt")


@pytest.fixture(scope="module", params=GPU_BACKENDS)
def backend(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Every GPU backend that `doctor` calls available, with plans of all engines where it needs them."""
    name = str(request.param)
    status = next(status for status in diagnose().backends if status.name == name)
    if not status.available:
        pytest.skip(f"{name}: {status.note}")
    with pytest.MonkeyPatch.context() as patch:
        if name in MODULES:
            patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
            bundle = open_bundle(DEFAULT_BUNDLE)
            build_plans(bundle, PlanOptions(builder=name), PlanCache(user_cache()), tuple(bundle.manifest.engines))
        yield name


def test_every_engine_equals_that_on_the_cpu(backend: str) -> None:
    report = verify_bundle(DEFAULT_BUNDLE, backend=backend, against_backend="ort-cpu")
    assert report.passed, [row for row in report.parity or [] if not row.passed]


def test_plans_are_in_fp32_and_take_the_batches_they_were_built_for(backend: str) -> None:
    if backend not in MODULES:
        pytest.skip("has no plans")
    bundle = open_bundle(DEFAULT_BUNDLE)
    plans = TensorRtBackend(bundle, backend).inspect_all()
    assert [seen.engine for seen in plans] == list(bundle.manifest.engines)
    for seen in plans:
        info = bundle.manifest.engines[seen.engine]
        assert seen.layers > 0
        assert seen.memory >= 0
        assert not {"fp16", "bf16"} & seen.types.keys()
        assert [shape[0] for shape in seen.profiles[info.inputs[0].name]] == list(PlanOptions().batch)


def test_a_plan_without_weights_takes_those_of_the_bundle(
    backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if backend not in MODULES:
        pytest.skip("has no plans")
    whole = np.asarray(Pipeline.from_bundle(backend=backend)("a church", seed=3, num_inference_steps=4).images[0])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    plans = build_plans(open_bundle(DEFAULT_BUNDLE), PlanOptions(builder=backend, strip_weights=True), PlanCache(user_cache()))
    assert plans
    refitted = np.asarray(Pipeline.from_bundle(backend=backend)("a church", seed=3, num_inference_steps=4).images[0])
    assert np.abs(whole.astype(int) - refitted).max() <= 1


def test_pictures_are_the_same_in_every_run(backend: str) -> None:
    pipeline = Pipeline.from_bundle(backend=backend)
    first, second = (np.asarray(pipeline("a church beside a cat", seed=3).images[0]) for _ in range(2))
    assert np.array_equal(first, second)


def test_threads_that_draw_at_once_get_what_they_get_alone(backend: str) -> None:
    pipeline = Pipeline.from_bundle(backend=backend)
    prompts = ["a church beside a cat", "a dog in ink style", "an abbey", "a balloon as a sticker"]

    def draw(prompt: str) -> np.ndarray:
        return np.asarray(pipeline(prompt, seed=9, num_inference_steps=8).images[0])

    alone = [draw(prompt) for prompt in prompts]
    with ThreadPoolExecutor(len(prompts)) as pool:
        together = [list(pool.map(draw, prompts)) for _ in range(2)]
    # a card multiplies other numbers of rows by other kernels: their sums differ by rounding
    assert all(np.abs(one.astype(int) - two).max() <= 1 for drawn in together for one, two in zip(alone, drawn, strict=True))


def test_few_numbers_of_rows_are_captured_before_anything_is_drawn(backend: str) -> None:
    pipeline = Pipeline.from_bundle(backend=backend)
    pipeline.batcher.prepare(["step"])
    rows = pipeline.batcher._groups["step"].rows
    prepared = set(rows._calls)
    pipeline(["a cat", "a dog", "a church"], num_inference_steps=4)
    if pipeline.backend.captures:
        assert set(rows._calls) == prepared
        assert {size for size, _ in prepared} == set(ladder(pipeline.batcher.capacity))


def test_a_step_waits_for_the_device_for_what_it_records_alone(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if backend in MODULES:
        pytest.skip("counts the waits of our own stream")
    pipeline = Pipeline.from_bundle(backend=backend)
    pipeline("a cat", num_inference_steps=4)  # captures
    waits = 0
    after_step = []
    original = CudaStream.synchronize

    def counted(stream: CudaStream) -> None:
        nonlocal waits
        waits += 1
        original(stream)

    monkeypatch.setattr(CudaStream, "synchronize", counted)
    pipeline("a cat", num_inference_steps=4, on_step=lambda *_: after_step.append(waits))
    # ok, score, fired and steps of rest; at the end latent and mask as well
    assert [after - before for before, after in pairwise(after_step)] == [4, 4, 6]


def test_nan_on_the_device_ends_in_an_error_and_no_picture(backend: str) -> None:
    pipeline = Pipeline.from_bundle(backend=backend)
    model = pipeline.model
    embedding = np.full((1, model.prompt_tokens, model.prompt_width), np.nan, np.float32)
    with pytest.raises((NonFiniteError, RequestError)):
        pipeline(prompt_embeds=embedding, num_inference_steps=4)


def test_the_record_names_the_backend(backend: str) -> None:
    record = Pipeline.from_bundle(backend=backend)("a cat", num_inference_steps=4).records[0]
    assert record.versions["backend"] == backend
