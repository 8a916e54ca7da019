"""The safety record of a picture: what the detector saw in every step, what was done, and by which engines."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


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
class SafetyRecord:
    """One picture. `steps` is empty where the operator switched the safety off."""

    prompt: str | None
    seed: int
    protected: bool
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
