"""The denoising loop: one call of the fused step graph a step, nothing allocated, copied or waited for in between."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from saferedir.engines import Manifest
from saferedir.engines.errors import CancelledError, NonFiniteError, SafeRedirError, SafetyEngineError
from saferedir.engines.manifest import PUBLISHED
from saferedir.runtime.backend import Backend, Call, DeviceTensor
from saferedir.runtime.policy import ResolvedPolicy
from saferedir.runtime.schedulers import Schedule

Float32 = npt.NDArray[np.float32]

#: Called after every step with (steps done, steps in all).
StepCallback = Callable[[int, int], None]


@dataclass(frozen=True)
class Batch:
    """What a batch of B requests brings to the loop, on the host."""

    #: Standard noise times the schedule's init sigma, [B, C, h, w].
    latent: Float32
    #: [B, T, D].
    prompt: Float32
    #: Unconditional or negative embedding, [B, T, D].
    negative: Float32
    guidance_scale: float
    #: Noise of each step's own, [steps, B, C, h, w], or None where the sampler adds none.
    noise: Float32 | None
    policies: tuple[ResolvedPolicy, ...]

    @property
    def guided(self) -> bool:
        """Guidance of at most 1 means unguided, as in diffusers."""
        return self.guidance_scale > 1


@dataclass(frozen=True)
class Denoised:
    """What the loop leaves: final latents, and the per-step records of protected runs."""

    #: [B, C, h, w].
    latent: Float32
    #: [steps, B, N].
    score: Float32
    #: [steps, B, N].
    fired: npt.NDArray[np.bool_]
    #: [steps, B], after each step.
    cooldown: npt.NDArray[np.int32]
    #: Of the last step, [B, N, T].
    token_mask: Float32


def denoise(
    backend: Backend,
    manifest: Manifest,
    schedule: Schedule,
    batch: Batch,
    *,
    on_step: StepCallback | None = None,
    protected: bool = True,
    cancel: threading.Event | None = None,
) -> Denoised:
    """Run every step of `schedule` with the safety in force, or without it where the operator switched it off.

    Raises:
        SafetyEngineError: the step graph raised.
        NonFiniteError: NaN or infinity in any request's latent, score or embedding; no latent is returned.
        CancelledError: `cancel` was set between two steps.
    """
    state = _StepTensors(backend, manifest, schedule, batch, protected=protected)
    calls = state.bind_all()
    for done, call in enumerate(calls, start=1):
        if cancel is not None and cancel.is_set():
            raise CancelledError(f"cancelled after {done - 1} of {len(calls)} steps")
        try:
            call()
        except SafeRedirError:
            raise
        except Exception as error:
            raise SafetyEngineError(f"engine {state.engine!r} raised in step {done}: {error}") from error
        if on_step is not None:
            on_step(done, len(calls))
    return state.collect()


class _StepTensors:
    """Device tensors of one run: constants, two alternating sets of state, and one record a step."""

    def __init__(self, backend: Backend, manifest: Manifest, schedule: Schedule, batch: Batch, *, protected: bool) -> None:
        self.backend = backend
        self.protected, self.stochastic = protected, batch.noise is not None
        self.predicts_noise = manifest.model is None or manifest.model.prediction_type == "epsilon"
        name = ("step" if protected else "plain_step") + ("" if batch.guided else "_unguided")
        self.engine = name if manifest.model is None else manifest.model.engine(name, *batch.latent.shape[2:])
        self.steps = len(schedule.timesteps)
        requests, concepts = len(batch.latent), len(manifest.safety.concepts)
        tokens = batch.prompt.shape[1]
        float32, int32, boolean = np.dtype(np.float32), np.dtype(np.int32), np.dtype(np.bool_)
        prompt = backend.upload(batch.prompt)
        zeros = backend.upload(np.zeros_like(batch.latent))
        self.constants: dict[str, DeviceTensor] = {
            "negative": backend.upload(batch.negative),
            "guidance_scale": backend.upload(np.full(requests, batch.guidance_scale, np.float32)),
            "original": prompt,
            "period": backend.upload(np.array([policy.cooldown for policy in batch.policies], np.int32)),
            "enabled": backend.upload(np.stack([policy.enabled for policy in batch.policies])),
            "threshold": backend.upload(np.stack([policy.threshold for policy in batch.policies])),
            "alpha_scale": backend.upload(np.stack([policy.alpha_scale for policy in batch.policies])),
        }
        self.per_step = [
            {
                "timestep": backend.upload(np.full(requests, schedule.timesteps[step], np.float32)),
                "input_scale": backend.upload(np.full(requests, schedule.input_scale[step], np.float32)),
                "coefficients": backend.upload(np.tile(schedule.coefficients[step], (requests, 1))),
                "noise": zeros if batch.noise is None else backend.upload(batch.noise[step]),
            }
            for step in range(self.steps)
        ]
        self.states = [
            {
                "latent": backend.upload(batch.latent),
                "prompt": backend.upload(batch.prompt) if protected else prompt,
                "active": backend.upload(np.zeros((requests, concepts), np.bool_)),
                "ok": backend.upload(np.ones(requests, np.bool_)),
            },
            {
                "latent": backend.empty(batch.latent.shape, float32),
                "prompt": backend.empty(batch.prompt.shape, float32) if protected else prompt,
                "active": backend.empty((requests, concepts), boolean),
                "ok": backend.empty((requests,), boolean),
            },
        ]
        if protected and manifest.controller == PUBLISHED:  # moves both halves of guidance
            self.constants["original_negative"] = self.constants.pop("negative")
            self.states[0]["negative"] = backend.upload(batch.negative)
            self.states[1]["negative"] = backend.empty(batch.negative.shape, float32)
        self.cooldowns = [backend.upload(np.zeros(requests, np.int32))]
        self.cooldowns += [backend.empty((requests,), int32) for _ in range(self.steps)]
        self.records = [
            {
                "score": backend.empty((requests, concepts), float32),
                "fired": backend.empty((requests, concepts), boolean),
            }
            for _ in range(self.steps)
        ]
        self.mask_shape = (requests, concepts, tokens)
        self.token_mask = backend.empty(self.mask_shape, float32)
        # What the model gave before is the next step's history; there is none before the first.
        self.model_outputs = [zeros, *(backend.empty(batch.latent.shape, float32) for _ in range(min(2, self.steps)))]

    def bind_all(self) -> list[Call]:
        calls = []
        for step in range(self.steps):
            before, after = self.states[step % 2], self.states[(step + 1) % 2]
            history, model_output = self._history(step), self._model_output(step + 1)
            inputs = self.constants | self.per_step[step] | before
            inputs |= {"cooldown": self.cooldowns[step], "history": history}
            outputs = {f"next_{name}": tensor for name, tensor in after.items()}
            outputs |= {"next_cooldown": self.cooldowns[step + 1], "model_output": model_output}
            outputs |= self.records[step] | {"token_mask": self.token_mask}
            calls.append(self.backend.bind(self.engine, inputs, outputs))
        return calls

    def _history(self, step: int) -> DeviceTensor:
        """What `step` is told that came before it, which with its latent tells the picture to be expected.

        Of a sampler that adds fresh noise that is the noise, where the model predicts such: what the latent holds beside it is
        the last step's estimate. Where the model predicts velocity it is told nothing.
        """
        if not self.stochastic or step == 0:
            return self._model_output(step)
        return self.per_step[step - 1]["noise"] if self.predicts_noise else self._model_output(0)

    def _model_output(self, step: int) -> DeviceTensor:
        """What the model gave in the step before `step`: two buffers in turn, and zeros before the first."""
        return self.model_outputs[0 if step == 0 else 2 - step % 2]

    def collect(self) -> Denoised:
        """Download once, and read `ok` before anything else is made of it: nothing of a run that is not ok leaves."""
        final = self.states[self.steps % 2]
        latent = self.backend.download(final["latent"])
        ok = np.isfinite(latent).reshape(len(latent), -1).all(axis=1)
        if self.protected:
            ok &= self.backend.download(final["ok"])
        if not ok.all():
            rows = ", ".join(str(row) for row in np.flatnonzero(~ok))
            raise NonFiniteError(f"NaN or infinity in request {rows} of the batch; no picture is drawn")
        if not self.protected:
            return self._unrecorded(latent)
        return Denoised(
            latent=latent,
            score=np.stack([self.backend.download(record["score"]) for record in self.records]),
            fired=np.stack([self.backend.download(record["fired"]) for record in self.records]),
            cooldown=np.stack([self.backend.download(tensor) for tensor in self.cooldowns[1:]]),
            token_mask=self.backend.download(self.token_mask),
        )

    def _unrecorded(self, latent: Float32) -> Denoised:
        requests, concepts, _ = self.mask_shape
        return Denoised(
            latent=latent,
            score=np.zeros((0, requests, concepts), np.float32),
            fired=np.zeros((0, requests, concepts), np.bool_),
            cooldown=np.zeros((0, requests), np.int32),
            token_mask=np.zeros(self.mask_shape, np.float32),
        )
