"""ONNX Runtime's TensorRT providers, as far as a machine without a GPU shows: what they are asked for, and what is said."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from saferedir.engines import open_bundle
from saferedir.engines.bundle import DEFAULT_BUNDLE
from saferedir.engines.errors import BackendError
from saferedir.runtime import ort, ort_stream
from saferedir.runtime.backends import backend_names, make_backend
from saferedir.runtime.ort_tensorrt import PREFIXES, OrtTensorRtBackend, profile_options


class Stream:
    """Stands for a stream on a device."""

    pointer = 7

    def __init__(self, user: str) -> None:
        self.user = user


def offer(patch: pytest.MonkeyPatch) -> None:
    """As on a machine whose ONNX Runtime has the TensorRT provider."""
    patch.setattr(ort, "is_offered", lambda *_: True)
    patch.setattr(ort_stream, "CudaStream", Stream)


@pytest.mark.parametrize(("name", "extra"), [("ort-tensorrt", "gpu"), ("ort-tensorrt-rtx", "rtx")])
def test_without_the_provider_it_is_said_what_to_install(name: str, extra: str) -> None:
    assert name in backend_names()
    with pytest.raises(BackendError, match=rf"saferedir\[{extra}\]"):
        make_backend(open_bundle(DEFAULT_BUNDLE), name)


@pytest.mark.skipif(ort.device_count() > 0, reason="there is a GPU")
@pytest.mark.parametrize("name", list(PREFIXES))
def test_without_a_driver_it_is_said_who_needs_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort, "is_offered", lambda *_: True)
    with pytest.raises(BackendError, match=f"{name} needs an NVIDIA GPU"):
        make_backend(open_bundle(DEFAULT_BUNDLE), name)


def test_one_profile_covers_the_batches_of_the_bundle() -> None:
    info = open_bundle(DEFAULT_BUNDLE).manifest.engines["text_encoder"]
    assert profile_options("nv", info.inputs, 8) == {
        "nv_profile_min_shapes": "input_ids:1x77",
        "nv_profile_opt_shapes": "input_ids:4x77",
        "nv_profile_max_shapes": "input_ids:8x77",
    }


def test_it_runs_on_our_stream_and_keeps_what_it_compiled_apart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    offer(monkeypatch)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    backend = OrtTensorRtBackend(open_bundle(DEFAULT_BUNDLE), "ort-tensorrt")
    options = {engine: backend._provider_options(engine) for engine in ("step", "step_unguided")}
    places = {Path(own["trt_engine_cache_path"]) for own in options.values()}
    assert len(places) == 2
    assert all(place.is_dir() and place.is_relative_to(tmp_path) for place in places)
    assert all(own["user_compute_stream"] == "7" and own["has_user_compute_stream"] == "1" for own in options.values())
    assert not any("graph" in name for name in options["step"])


def test_a_provider_that_is_not_taken_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    offer(monkeypatch)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    backend = OrtTensorRtBackend(open_bundle(DEFAULT_BUNDLE), "ort-tensorrt")
    with pytest.raises(BackendError):  # this ONNX Runtime has it not, and would go on with the CPU
        backend._session("step")


def test_a_capture_waits_until_no_other_thread_waits_for_the_device() -> None:
    waiters = ort_stream._Waiters()
    waiters.enter()
    capture = threading.Thread(target=waiters.none_left)
    capture.start()
    capture.join(0.05)
    assert capture.is_alive()
    waiters.leave()
    capture.join(5)
    assert not capture.is_alive()
