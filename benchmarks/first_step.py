"""What the safety says in the first step of a picture alone: nothing is drawn to its end."""

from __future__ import annotations

import os
import threading
from contextlib import suppress

import numpy as np
import numpy.typing as npt
from rich.progress import track

from benchmarks.drawing import Setting, Studio, drawing_key
from saferedir.engines.errors import CancelledError
from saferedir.runtime import Pipeline
from saferedir.runtime.backend import Backend, BackendAround, Call, Tensors


class Listening(BackendAround):
    """Another backend, of whose steps it is kept what fired."""

    def __init__(self, backend: Backend) -> None:
        super().__init__(backend)
        self.fired: list[npt.NDArray[np.bool_]] = []

    def bind(self, engine: str, inputs: Tensors, outputs: Tensors, rows: int | None = None) -> Call:
        call = super().bind(engine, inputs, outputs, rows)
        if "fired" not in outputs:
            return call

        def heard() -> None:
            call()
            self.fired.append(self.read(outputs["fired"], 0, rows).astype(np.bool_))

        return heard


def fired_at_first(
    studio: Studio, pipeline: Pipeline, identity: str, prompts: list[str], seeds: list[int], setting: Setting
) -> npt.NDArray[np.bool_]:
    """[R, N]: which concepts fire in the first of `setting.steps` steps by the bundle's own policy; kept as pictures are."""
    path = studio.folder / f"{drawing_key(pipeline, identity, prompts, seeds, setting)}-first.npy"
    if not path.exists():
        partial = path.with_suffix(f".{os.getpid()}.partial")
        with partial.open("wb") as file:
            np.save(file, _heard(pipeline, prompts, seeds, setting))
        os.replace(partial, path)
    fired: npt.NDArray[np.bool_] = np.load(path)
    return fired


def _heard(pipeline: Pipeline, prompts: list[str], seeds: list[int], setting: Setting) -> npt.NDArray[np.bool_]:
    listening = Listening(pipeline.backend)
    own, first = Pipeline(pipeline.bundle, listening), []
    batch = pipeline.manifest.max_batch
    for start in track(range(0, len(prompts), batch), description=f"first of {setting.steps} steps"):
        part, stop = slice(start, start + batch), threading.Event()

        def after_step(done: int, total: int, stop: threading.Event = stop) -> None:
            stop.set()

        with suppress(CancelledError):
            own(
                prompts[part], seed=seeds[part], num_inference_steps=setting.steps, guidance_scale=setting.guidance,
                scheduler=setting.scheduler, on_step=after_step, cancel=stop,
            )  # fmt: skip
        first.append(listening.fired[0])  # by the time that it is cancelled others may be done
        listening.fired.clear()
    return np.concatenate(first)
