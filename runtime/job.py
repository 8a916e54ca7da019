"""A picture under way: what a step graph reads of it, and where it stands in its own schedule."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from saferedir.engines.errors import NonFiniteError
from saferedir.engines.step import NUMBERS, USUAL_GUIDANCE
from saferedir.runtime.noise import TorchNoise
from saferedir.runtime.policy import ResolvedPolicy
from saferedir.runtime.schedulers import Schedule

Array = npt.NDArray[Any]
Float32 = npt.NDArray[np.float32]

#: The threshold of a concept that is not looked for: no score reaches it.
NEVER = 2.0


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """One picture to draw, on the host. Nothing of it changes while it is drawn."""

    #: The step graph that draws it, of its size, guided or not, protected or not.
    engine: str
    schedule: Schedule
    #: [T, D].
    prompt: Float32
    #: Unconditional or negative embedding, [T, D].
    negative: Float32
    guidance_scale: float
    #: 0 to 1.
    guidance_rescale: float
    policy: ResolvedPolicy
    #: Of the first latent, and of the steps that add some.
    seed: int
    #: C, h, w of the latent.
    size: tuple[int, int, int]

    @property
    def steps(self) -> int:
        return len(self.schedule.timesteps)


@dataclass(frozen=True)
class Denoised:
    """What is left of a picture's steps: its final latent, and of a protected one what every step recorded."""

    #: [C, h, w].
    latent: Float32
    #: [steps, N]; no steps where it was drawn unprotected.
    score: Float32
    #: [steps, N].
    fired: npt.NDArray[np.bool_]
    #: [steps], after each step.
    cooldown: npt.NDArray[np.int32]
    #: Of the last step, [N, T].
    token_mask: Float32


class Job:
    """A drawing at one of its steps."""

    def __init__(self, drawing: Drawing) -> None:
        self.drawing = drawing
        #: Steps that are done.
        self.done = 0
        self._noise = TorchNoise(drawing.seed)
        self._adds = drawing.schedule.adds_noise
        self._numbers = drawing.schedule.numbers.copy()
        if drawing.guidance_scale > 1:
            amplification = max(0.0, drawing.guidance_scale / USUAL_GUIDANCE - 1)
            self._numbers[:, NUMBERS.index("amplification")] = amplification
        #: What each step recorded; nothing of an unprotected one.
        self.recorded: list[Mapping[str, Array]] = []

    @property
    def last(self) -> Mapping[str, Array]:
        """What the last step recorded; nothing of an unprotected one."""
        return self.recorded[-1] if self.recorded else {}

    @property
    def finished(self) -> bool:
        return self.done == self.drawing.steps

    def first(self) -> dict[str, Array]:
        """Its row of the tensors that are the same in every step, and of the state before the first."""
        own, policy = self.drawing, self.drawing.policy
        latent = self._noise.draw((1, *own.size))[0] * np.float32(own.schedule.init_noise_sigma)
        return {
            "latent": latent,
            "denoised": np.zeros_like(latent),
            "prompt": own.prompt,
            "negative": own.negative,
            "original": own.prompt,
            "original_negative": own.negative,
            "guidance_scale": np.float32(own.guidance_scale),
            "guidance_rescale": np.float32(own.guidance_rescale),
            "cooldown": np.int32(0),
            "period": np.int32(policy.cooldown),
            "active": np.zeros_like(policy.enabled),
            "ok": np.bool_(True),
            "enabled": policy.enabled,
            "threshold": np.where(policy.enabled, policy.threshold, np.float32(NEVER)),
            "alpha_scale": policy.alpha_scale,
        }  # fmt: skip

    def next(self) -> dict[str, Array | None]:
        """Its row of the tensors that differ from step to step, for the step that follows; None stands for zero."""
        adds = bool(self._adds[self.done])
        return {
            "timestep": self.drawing.schedule.timesteps[self.done],
            "numbers": self._numbers[self.done],
            "noise": self._noise.draw((1, *self.drawing.size))[0] if adds else None,
        }

    def take(self, recorded: Mapping[str, Array]) -> None:
        """Its row of what a step records.

        Raises:
            NonFiniteError: the step says that something was not finite, or nothing at all.
        """
        self.done += 1
        if not recorded.get("next_ok", True):
            raise NonFiniteError(f"NaN or infinity in step {self.done}; no picture is drawn")
        if recorded:
            self.recorded.append(recorded)

    def denoised(self, latent: Float32, token_mask: Float32 | None) -> Denoised:
        """What is left after its last step.

        Raises:
            NonFiniteError: the latent is not finite.
        """
        if not np.isfinite(latent).all():
            raise NonFiniteError("NaN or infinity in the last latent; no picture is drawn")
        concepts, tokens = len(self.drawing.policy.concepts), len(self.drawing.prompt)
        records = self.recorded
        return Denoised(
            latent,
            _stacked([record["score"] for record in records], (concepts,), np.float32),
            _stacked([record["fired"] for record in records], (concepts,), np.bool_),
            _stacked([record["next_cooldown"] for record in records], (), np.int32),
            np.zeros((concepts, tokens), np.float32) if token_mask is None else token_mask,
        )


def _stacked(rows: list[Array], shape: tuple[int, ...], dtype: Any) -> Array:
    return np.stack(rows).astype(dtype) if rows else np.zeros((0, *shape), dtype)
