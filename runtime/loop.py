"""The denoising loop: one call of the fused step graph a step, nothing allocated, copied or waited for in between."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from saferedir.engines import Manifest
from saferedir.engines.errors import CancelledError, NonFiniteError, SafeRedirError, SafetyEngineError
from saferedir.engines.manifest import PUBLISHED
from saferedir.engines.step import LATENT, NUMBERS, PROMPT, USUAL_GUIDANCE, Role, form_of_step, step_tensors
from saferedir.runtime.backend import Backend, Call, DeviceTensor
from saferedir.runtime.policy import ResolvedPolicy
from saferedir.runtime.schedulers import Schedule

Float32 = npt.NDArray[np.float32]

#: The threshold of a concept that is not looked for: no score reaches it.
NEVER = 2.0
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
    #: 0 to 1.
    guidance_rescale: float
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
    """Device tensors of one run, written from the declaration of the step.

    What a step gives is nothing until it has given it: NaN, false or -1, in every buffer that a step writes. The state that the
    host hands in is read by the first step and by nobody else, so that a step that leaves something out ends in `ok` being
    false, and no picture.
    """

    def __init__(self, backend: Backend, manifest: Manifest, schedule: Schedule, batch: Batch, *, protected: bool) -> None:
        self.backend = backend
        self.protected, self.steps = protected, len(schedule.timesteps)
        name = ("step" if protected else "plain_step") + ("" if batch.guided else "_unguided")
        self.engine = name if manifest.model is None else manifest.model.engine(name, *batch.latent.shape[2:])
        tensors = step_tensors(form_of_step(name, published=manifest.controller == PUBLISHED))
        self.mask_shape = (len(batch.latent), len(manifest.safety.concepts), batch.prompt.shape[1])
        host = _host_arrays(schedule, batch, self.mask_shape[1])
        shapes = dict(zip((*LATENT, *PROMPT[1:]), (*batch.latent.shape, *batch.prompt.shape[1:]), strict=True))
        shapes["concepts"] = self.mask_shape[1]
        self.constants = {t.name: backend.upload(host[t.name]) for t in tensors if t.role is Role.CONSTANT}
        self.per_step = {t.name: self._of_steps(host[t.name]) for t in tensors if t.role is Role.PER_STEP}
        #: Of states and records: before the first step, and after each.
        self.states = {t.name: [backend.upload(host[t.name])] for t in tensors if t.role is Role.STATE}
        self.outputs: dict[str, list[DeviceTensor]] = {}
        for tensor in tensors:
            if tensor.role in (Role.STATE, Role.RECORD):
                shape = tuple(shapes[size] if isinstance(size, str) else size for size in tensor.shape)
                blanks = [self._blank(shape, tensor.dtype) for _ in range(self.steps if tensor.every_step else 2)]
                self.outputs[tensor.output] = [blanks[step % len(blanks)] for step in range(self.steps)]
            if tensor.role is Role.STATE:
                self.states[tensor.name] += self.outputs[tensor.output]

    def bind_all(self) -> list[Call]:
        return [
            self.backend.bind(
                self.engine,
                self.constants | {name: tensors[step] for name, tensors in (self.per_step | self.states).items()},
                {name: tensors[step] for name, tensors in self.outputs.items()},
            )
            for step in range(self.steps)
        ]

    def _of_steps(self, values: npt.NDArray[Any]) -> list[DeviceTensor]:
        """One tensor a step; of values that are the same in all, [1, ...], one for all."""
        tensors = [self.backend.upload(value) for value in values]
        return tensors * self.steps if len(tensors) == 1 else tensors

    def _blank(self, shape: tuple[int, ...], dtype: str) -> DeviceTensor:
        return self.backend.upload(np.full(shape, {"float32": np.nan, "int32": -1, "bool": False}[dtype], dtype))

    def collect(self) -> Denoised:
        """Download once, and read `ok` before anything else is made of it: nothing of a run that is not ok leaves."""
        latent = self.backend.download(self.states["latent"][-1])
        ok = np.isfinite(latent).reshape(len(latent), -1).all(axis=1)
        if self.protected:
            ok &= self.backend.download(self.states["ok"][-1])
        if not ok.all():
            rows = ", ".join(str(row) for row in np.flatnonzero(~ok))
            raise NonFiniteError(f"NaN or infinity in request {rows} of the batch; no picture is drawn")
        if not self.protected:
            return self._unrecorded(latent)
        return Denoised(
            latent=latent,
            score=self._recorded("score"),
            fired=self._recorded("fired"),
            cooldown=self._recorded("next_cooldown"),
            token_mask=self.backend.download(self.outputs["token_mask"][-1]),
        )

    def _recorded(self, output: str) -> npt.NDArray[Any]:
        """What every step gave."""
        return np.stack([self.backend.download(tensor) for tensor in self.outputs[output]])

    def _unrecorded(self, latent: Float32) -> Denoised:
        requests, concepts, _ = self.mask_shape
        return Denoised(
            latent=latent,
            score=np.zeros((0, requests, concepts), np.float32),
            fired=np.zeros((0, requests, concepts), np.bool_),
            cooldown=np.zeros((0, requests), np.int32),
            token_mask=np.zeros(self.mask_shape, np.float32),
        )


def _numbers(schedule: Schedule, batch: Batch) -> Float32:
    """The schedule's numbers for every request, [steps, B, columns], with how far guidance amplifies what it draws."""
    numbers = np.repeat(schedule.numbers[:, None], len(batch.latent), axis=1)
    if batch.guided:
        numbers[:, :, NUMBERS.index("amplification")] = max(0.0, batch.guidance_scale / USUAL_GUIDANCE - 1)
    return numbers


def _host_arrays(schedule: Schedule, batch: Batch, concepts: int) -> dict[str, npt.NDArray[Any]]:
    """What the host gives of a step's tensors: constants, first states, and of what differs between steps one row a step."""
    requests, policies = len(batch.latent), batch.policies
    nothing = np.zeros_like(batch.latent)
    return {
        "latent": batch.latent,
        "timestep": np.repeat(schedule.timesteps[:, None], requests, axis=1),
        "numbers": _numbers(schedule, batch),
        "denoised": nothing,
        "noise": nothing[None] if batch.noise is None else batch.noise,
        "prompt": batch.prompt,
        "negative": batch.negative,
        "guidance_scale": np.full(requests, batch.guidance_scale, np.float32),
        "guidance_rescale": np.full(requests, batch.guidance_rescale, np.float32),
        "original": batch.prompt,
        "original_negative": batch.negative,
        "cooldown": np.zeros(requests, np.int32),
        "period": np.array([policy.cooldown for policy in policies], np.int32),
        "active": np.zeros((requests, concepts), np.bool_),
        "ok": np.ones(requests, np.bool_),
        "enabled": np.stack([policy.enabled for policy in policies]),
        "threshold": np.stack([np.where(policy.enabled, policy.threshold, NEVER) for policy in policies]).astype(np.float32),
        "alpha_scale": np.stack([policy.alpha_scale for policy in policies]),
    }
