"""Whatever goes wrong with the safety, no picture leaves: a typed error does."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from saferedir.engines import open_bundle
from saferedir.engines.errors import (
    BackendError,
    BundleAlteredError,
    BundleMissingFileError,
    NonFiniteError,
    SafetyEngineError,
)
from saferedir.runtime import Pipeline


class FaultyBackend:
    """The real backend, with a fault planted at one step of the protected graph."""

    name = "faulty"

    def __init__(self, inner: Any, at: int, fault: str) -> None:
        self.inner, self.at, self.fault, self.step = inner, at, fault, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def bind(
        self, engine: str, inputs: Mapping[str, Any], outputs: Mapping[str, Any], rows: int | None = None
    ) -> Callable[[], None]:
        call = self.inner.bind(engine, inputs, outputs, rows)
        if not engine.startswith("step"):
            return call  # type: ignore[no-any-return]

        def faulty() -> None:
            index, self.step = self.step, self.step + 1
            if index == self.at and self.fault == "raise":
                raise RuntimeError("device lost")
            if index == self.at and self.fault in inputs:
                poison(inputs[self.fault])
            call()
            if index == self.at and self.fault in outputs:
                poison(outputs[self.fault])

        return faulty


def poison(tensor: Any) -> None:
    """One NaN in a device tensor."""
    values = tensor.numpy().copy()
    values.flat[0] = np.nan
    tensor.update_inplace(values)


LAST = 4


@pytest.mark.parametrize("at", [0, 2, LAST], ids=["first", "middle", "last"])
@pytest.mark.parametrize("fault", ["latent", "prompt", "next_latent"])
def test_nan_gives_no_picture(pipeline: Pipeline, fault: str, at: int) -> None:
    faulty = Pipeline(pipeline.bundle, FaultyBackend(pipeline.backend, at, fault))
    with pytest.raises(NonFiniteError, match="no picture"):
        faulty("a church", num_inference_steps=LAST + 1)


def test_one_bad_request_keeps_the_whole_batch_back(pipeline: Pipeline) -> None:
    faulty = Pipeline(pipeline.bundle, FaultyBackend(pipeline.backend, 1, "latent"))
    with pytest.raises(NonFiniteError, match="no picture"):
        faulty(["a cat", "a dog"], num_inference_steps=4)


@pytest.mark.parametrize("at", [0, 2, LAST])
def test_raising_gives_no_picture(pipeline: Pipeline, at: int) -> None:
    faulty = Pipeline(pipeline.bundle, FaultyBackend(pipeline.backend, at, "raise"))
    with pytest.raises(SafetyEngineError, match=f"step {at + 1}.*device lost"):
        faulty("a cat", num_inference_steps=LAST + 1)


def test_nan_weights_give_no_picture(bundle_copy: Path, rehash: Callable[[Path, str], None]) -> None:
    weights = bundle_copy / "safety.safetensors"
    weights.write_bytes(np.full(weights.stat().st_size // 2, np.nan, np.float16).tobytes())
    rehash(bundle_copy, "safety.safetensors")
    with pytest.raises(NonFiniteError):
        Pipeline.from_bundle(bundle_copy)("a cat", num_inference_steps=4)


def test_step_graph_of_another_width_gives_no_picture(bundle_copy: Path, rehash: Callable[[Path, str], None]) -> None:
    graph = onnx.load(bundle_copy / "step.onnx", load_external_data=False)
    for value in graph.graph.input:
        if value.name == "original":
            value.type.tensor_type.shape.dim[2].dim_value = 64
    (bundle_copy / "step.onnx").write_bytes(graph.SerializeToString())
    rehash(bundle_copy, "step.onnx")
    with pytest.raises((BackendError, BundleAlteredError), match=r"step\.onnx"):
        Pipeline.from_bundle(bundle_copy)("a cat", num_inference_steps=4)


def test_unsafe_bundle_never_opens(bundle_copy: Path) -> None:
    (bundle_copy / "step.onnx").unlink()
    with pytest.raises(BundleMissingFileError, match=r"step\.onnx"):
        open_bundle(bundle_copy)


def test_half_written_engine_is_a_typed_error(bundle_copy: Path, rehash: Callable[[Path, str], None]) -> None:
    data = (bundle_copy / "step.onnx").read_bytes()
    (bundle_copy / "step.onnx").write_bytes(data[: len(data) // 2])
    rehash(bundle_copy, "step.onnx")
    with pytest.raises(BundleAlteredError, match=r"step\.onnx is no ONNX graph"):
        Pipeline.from_bundle(bundle_copy)("a cat", num_inference_steps=4)
