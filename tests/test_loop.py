"""What a step is given, and on which backend."""

from __future__ import annotations

import gc
import weakref
from itertools import pairwise

import numpy as np
import pytest

from saferedir.engines import open_bundle
from saferedir.engines.bundle import DEFAULT_BUNDLE
from saferedir.engines.step import NUMBERS
from saferedir.runtime import Pipeline, SafetyPolicy
from saferedir.runtime.ort import OrtBackend, resolve_provider
from saferedir.runtime.replay import RecordingBackend, Runs, record_runs


@pytest.mark.parametrize("scheduler", ["ddim", "dpm++-2m", "euler-ancestral", "lcm"])
def test_a_step_is_given_the_estimate_that_the_last_one_moved_by(pipeline: Pipeline, scheduler: str) -> None:
    recording = RecordingBackend(pipeline.backend, pipeline.manifest.engines)
    drawing = Pipeline(pipeline.bundle, recording, SafetyPolicy(beyond_promise=True))
    drawing(["a cat", "a fox"], num_inference_steps=4, scheduler=scheduler)
    given = recording.recorded["step"]
    assert [step["numbers"][:, NUMBERS.index("known")].tolist() for step in given] == [[0, 0], [1, 1], [1, 1], [1, 1]]
    assert not given[0]["denoised"].any()
    for before, after in pairwise(given):
        of = dict(zip(NUMBERS, before["numbers"][0], strict=True))
        moved = of["of_latent"] * before["latent"] + of["of_denoised"] * after["denoised"]
        moved = moved + of["of_before"] * before["denoised"] + of["of_noise"] * before["noise"]
        np.testing.assert_allclose(after["latent"], moved, atol=1e-5)


@pytest.mark.parametrize(("devices", "chosen"), [(0, "ort-cpu"), (1, "ort-cuda")])
def test_auto_takes_cuda_where_there_is_a_device(monkeypatch: pytest.MonkeyPatch, devices: int, chosen: str) -> None:
    class Offering:
        @staticmethod
        def get_available_providers() -> list[str]:
            return ["CUDAExecutionProvider", "CPUExecutionProvider"]

    monkeypatch.setattr("saferedir.runtime.ort.import_onnxruntime", Offering)
    monkeypatch.setattr("saferedir.runtime.ort.device_count", lambda: devices)
    assert resolve_provider("auto") == chosen


def test_runs_are_recorded_at_settings_that_nothing_is_promised_for() -> None:
    bundle = open_bundle(DEFAULT_BUNDLE)
    assert bundle.manifest.safety.promise is not None and bundle.manifest.safety.promise.envelope.steps[0] > 2
    found = record_runs(bundle, lambda: OrtBackend(bundle, "ort-cpu"), Runs(1, 2))
    assert {"step", "step_unguided", "plain_step", "vae_decoder"} <= set(found)


def test_a_call_holds_the_tensors_it_was_bound_to() -> None:
    bundle = open_bundle(DEFAULT_BUNDLE)
    backend, engine = OrtBackend(bundle, "ort-cpu"), bundle.manifest.engines["text_encoder"]
    (given,), (result,) = engine.inputs, engine.outputs
    tokens = backend.upload(np.zeros([1, *given.shape[1:]], given.dtype))
    encoded = backend.empty((1, *map(int, result.shape[1:])), np.dtype(result.dtype))
    alive = [weakref.ref(tokens), weakref.ref(encoded)]
    call = backend.bind("text_encoder", {given.name: tokens}, {result.name: encoded})
    del tokens, encoded
    gc.collect()
    call()
    assert all(tensor() is not None for tensor in alive)
