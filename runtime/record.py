"""The safety record of a picture: what the detector saw in every step, what was done, and by which engines."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class StepRecord:
    """One denoising step of one picture."""

    timestep: float
    #: Concept -> detector score in [0, 1]; computed in every step, also while cooling down.
    score: dict[str, float]
    #: Concepts that fired in this step; such as had fired before do so at a lower score.
    fired: tuple[str, ...]
    #: Steps of rest left after this step.
    cooldown: int


@dataclass(frozen=True)
class LookedFor:
    """How one concept was looked for in a picture."""

    #: Score from which on it fires; None where the engine decides by argmax.
    threshold: float | None
    #: Strength of redirection; None where there is no such choice.
    alpha_scale: float | None


@dataclass(frozen=True)
class SafetyRecord:
    """One picture. `steps` is empty where the operator switched the safety off."""

    prompt: str | None
    #: Whether a negative prompt or its embedding was "given", "none" was, or it was "ignored" since guidance was at most 1.
    negative_prompt: Literal["none", "given", "ignored"]
    #: The seed really used, which draws the same again.
    seed: int
    #: A name of `schedulers.SCHEDULERS`.
    scheduler: str
    num_inference_steps: int
    guidance_scale: float
    #: How far what guidance drew was taken to the contrast of its conditional half, 0 to 1.
    guidance_rescale: float
    #: Of the picture, in pixels.
    height: int
    width: int
    #: Whether anything was looked for.
    protected: bool
    #: Whether these settings are among those that the safety's promise is for; None where there is none.
    within_promise: bool | None
    #: What was looked for, by concept; empty where the operator switched the safety off.
    looked_for: dict[str, LookedFor]
    #: Steps of rest after a firing; None where nothing was looked for.
    cooldown: int | None
    #: How many tokens of the prompt did not fit and were cut.
    tokens_cut: int
    steps: tuple[StepRecord, ...]
    #: Token texts up to end of text, of the prompt as it was read (`saferedir.engines.plain_letters`); empty where
    #: embeddings were given.
    tokens: tuple[str, ...]
    #: Concept -> mask of every prompt position in the last step, in [0, 1]; only concepts that fired.
    token_mask: dict[str, tuple[float, ...]]
    #: Bundle, engines' hashes, runtime and backend versions.
    versions: dict[str, str]

    @property
    def fired(self) -> bool:
        """Whether anything fired in any step."""
        return any(step.fired for step in self.steps)

    def to_dict(self) -> dict[str, Any]:
        """As plain data, for JSON."""
        return asdict(self) | {"fired": self.fired}
