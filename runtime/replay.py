"""What engines are given in real runs, recorded on one backend and given to any other."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np

from saferedir.engines import Bundle
from saferedir.engines.errors import RequestError
from saferedir.engines.manifest import PUBLISHED, EngineInfo
from saferedir.engines.step import STEP
from saferedir.runtime.backend import Array, Backend, BackendAround, Call, Tensors
from saferedir.runtime.pipeline import Generation, Pipeline
from saferedir.runtime.policy import SafetyPolicy

PROMPTS = ("a church", "a church next to a cat in ink style", "a castle on blue", "")
#: Height and width of the latent where no model states one.
ANY_SIZE = 16
SIZES = {"batch": len(PROMPTS)}


@dataclass(frozen=True)
class Runs:
    """How much is drawn for a comparison: how many of `PROMPTS`, all in one batch, and in how many steps."""

    pictures: int = len(PROMPTS)
    steps: int = 8

    def __post_init__(self) -> None:
        for name, given, most in (("pictures", self.pictures, len(PROMPTS)), ("steps", self.steps, 1000)):
            if not 1 <= given <= most:
                raise RequestError(f"{name} is {given}; expected 1 to {most}")


#: Engine -> what it was given, call by call.
Recorded = dict[str, list[dict[str, Array]]]


class RecordingBackend(BackendAround):
    """Another backend, of which every call's inputs are kept."""

    def __init__(self, backend: Backend, engines: Mapping[str, EngineInfo]) -> None:
        super().__init__(backend)
        self.recorded: Recorded = {}
        self._engines = engines

    def bind(self, engine: str, inputs: Tensors, outputs: Tensors, rows: int | None = None) -> Call:
        bound = self.backend.bind(engine, inputs, outputs, rows)

        def call() -> None:
            given = {tensor.name: self.backend.read(inputs[tensor.name], 0, rows) for tensor in self._engines[engine].inputs}
            if "latent" in given:  # rows that only pad the batch hold nothing
                held = np.isfinite(given["latent"]).all(axis=(1, 2, 3))
                given = {name: values[held] for name, values in given.items()}
            self.recorded.setdefault(engine, []).append(given)
            bound()

        return call


def record_runs(bundle: Bundle, open_backend: Callable[[], Backend], runs: Runs) -> Recorded:
    """Inputs of every engine of `bundle`, from runs of `PROMPTS` with and without guidance and safety.

    Each kind of step is drawn on a backend of its own, so that the engines of one need not fit into memory beside the others'.
    Among the protected runs are some whose thresholds every score reaches, so that every other step fires. A bundle that
    holds a safety alone gets noise.
    """
    if bundle.manifest.model is None:
        return _noise(bundle.manifest.engines, runs.steps)
    names = [concept.name for concept in bundle.manifest.safety.concepts]
    by_argmax = bundle.manifest.controller == PUBLISHED
    usual, without = SafetyPolicy(beyond_promise=True), SafetyPolicy(unprotected=True)  # no picture leaves
    always = replace(usual, cooldown=1, thresholds={} if by_argmax else dict.fromkeys(names, 0.0))
    recorded: Recorded = {}
    kinds = (((usual, always), 5.0), ((always,), 1.0), ((without,), 5.0), ((without,), 1.0))
    for size in bundle.manifest.model.sizes:
        for policies, guidance in kinds:
            recording = RecordingBackend(open_backend(), bundle.manifest.engines)
            with _unsaid():
                for policy in policies:
                    draw(Pipeline(bundle, recording, policy), guidance, runs, size)
            for engine, calls in recording.recorded.items():
                recorded.setdefault(engine, []).extend(calls)
    return recorded


def draw(pipeline: Pipeline, guidance: float, runs: Runs, size: tuple[int, int] | None = None) -> Generation:
    """The pictures that recorded runs are of, of latents of height and width `size`, the model's own by default."""
    height, width = (side * pipeline.model.vae_scale_factor for side in size or pipeline.model.sizes[0])
    return pipeline(
        list(PROMPTS[: runs.pictures]), height=height, width=width, seed=0, num_inference_steps=runs.steps,
        guidance_scale=guidance,
    )  # fmt: skip


def replay(bundle: Bundle, backend: Backend, engine: str, recorded: Recorded) -> dict[str, Array]:
    """What `backend` makes of an engine's recorded inputs: output -> all calls' results, one after the other."""
    info = bundle.manifest.engines[engine]
    calls = [_run(backend, engine, info, given) for given in recorded[engine]]
    return {tensor.name: np.concatenate([call[tensor.name] for call in calls]) for tensor in info.outputs}


def _run(backend: Backend, engine: str, info: EngineInfo, given: Mapping[str, Array]) -> dict[str, Array]:
    sizes: dict[int | str, int] = {}
    for tensor in info.inputs:
        sizes |= dict(zip(tensor.shape, given[tensor.name].shape, strict=True))
    inputs = {name: backend.upload(array) for name, array in given.items()}
    outputs = {
        tensor.name: backend.empty(
            tuple(size if isinstance(size, int) else sizes[size] for size in tensor.shape), np.dtype(tensor.dtype)
        )
        for tensor in info.outputs
    }
    backend.bind(engine, inputs, outputs)()
    return {name: backend.read(tensor) for name, tensor in outputs.items()}


@contextmanager
def _unsaid() -> Iterator[None]:
    """No warning that the safety is off: no picture of these runs leaves."""
    log = logging.getLogger("saferedir")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)


def _noise(engines: Mapping[str, EngineInfo], steps: int) -> Recorded:
    rng = np.random.default_rng(0)
    recorded: Recorded = {}
    likely = {tensor.name: tensor.example for tensor in STEP if tensor.example is not None}
    for engine, info in engines.items():
        recorded[engine] = []
        for step in range(steps):
            own = likely | {"timestep": 981 * (steps - step) // steps, "cooldown": step % 2, "active": step > 0}
            given = {}
            for tensor in info.inputs:
                shape = tuple(size if isinstance(size, int) else SIZES.get(size, ANY_SIZE) for size in tensor.shape)
                value = np.full(shape, own[tensor.name]) if tensor.name in own else rng.standard_normal(shape)
                given[tensor.name] = value.astype(tensor.dtype)
            recorded[engine].append(given)
    return recorded
