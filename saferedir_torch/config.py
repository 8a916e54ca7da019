"""What a safety module is made for: shapes, concepts, widths. Saved as `config.json` beside its weights."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from saferedir.engines.errors import RequestError


@dataclass(frozen=True, kw_only=True)
class Concept:
    """One concept to forget, as training left it."""

    name: str
    #: What is drawn in its place.
    replacement: str
    #: The detector fires where the score reaches this, calibrated on validation trajectories.
    threshold: float = 0.5
    #: `s` of the redirection formula; the value trained at.
    alpha_scale: float = 1.5


@dataclass(frozen=True, kw_only=True)
class Promise:
    """What the thresholds promise: the safety fires on at most `rate` of benign pictures, with `confidence`."""

    rate: float
    confidence: float
    #: Benign pictures calibrated on, and how many of them reach the bound.
    pictures: int
    allowed: int
    #: How they were drawn, and of what prompts.
    steps: int
    guidance_scale: float
    prompts: str


@dataclass(frozen=True, kw_only=True)
class SafetyConfig:
    """Shapes of the model it protects, the concepts, and the widths of the network."""

    latent_channels: int
    #: T, prompt tokens.
    prompt_tokens: int
    #: D, prompt embedding width.
    prompt_width: int
    concepts: tuple[Concept, ...]
    prediction_type: str = "epsilon"
    #: SHA-256 over the text encoder's weights (`fit.encoder_hashes`); a module fits only the text encoder it was trained with.
    text_encoder_sha256: str = ""
    #: The same of weights that fp16 rounds: without going through it. Empty where both are one.
    text_encoder_direct_sha256: str = ""
    #: SHA-256 over the UNet's parameters; another UNet is allowed and recorded.
    unet_sha256: str = ""
    #: How many concepts each branch of the network holds, in the order of `concepts`: first those trained together, then
    #: one number for every later addition. Empty means all in one.
    branches: tuple[int, ...] = ()
    #: Steps during which detection rests after it fired.
    cooldown: int = 2
    #: A concept that fires although it is active already is redirected with this times its strength, or with a refuge to
    #: the embedding of a safe prompt that asks for what is drawn in its place and for little else.
    persistence: float = 1.5
    #: It fires again at this share of its threshold: a run in which it was seen is watched more closely.
    vigilance: float = 0.75
    refuge: bool = False
    #: What a step shows is scored without the prompt as well, which strange words could speak against it.
    alone: bool = False
    latent_widths: tuple[int, int, int] = (64, 128, 256)
    latent_features: int = 512
    picture_widths: tuple[int, int, int] = (48, 96, 128)
    picture_features: int = 256
    timestep_frequencies: int = 320
    timestep_features: int = 64
    context_heads: int = 4
    classifier_width: int = 256
    words_width: int = 64
    redirector_width: int = 256
    redirector_heads: int = 4
    adapter_rank: int = 32
    #: What calibration promises about false alarms; None before calibration.
    promise: Promise | None = None
    #: How the module was made: command, seeds, versions, figures.
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def joint_features(self) -> int:
        """Width of j, the joint feature of latent and timestep."""
        return self.latent_features + self.timestep_features

    @property
    def branch_sizes(self) -> tuple[int, ...]:
        """Concepts a branch, for every branch."""
        return self.branches or (len(self.concepts),)

    @property
    def concept_names(self) -> list[str]:
        return [concept.name for concept in self.concepts]

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> SafetyConfig:
        """The configuration in `path`.

        Raises:
            RequestError: the file is missing, not JSON, or lacks or misnames a field.
        """
        try:
            raw = json.loads(path.read_text())
            raw["concepts"] = tuple(Concept(**concept) for concept in raw["concepts"])
            for widths in ("latent_widths", "picture_widths"):
                if widths in raw:
                    raw[widths] = tuple(raw[widths])
            raw["branches"] = tuple(raw.get("branches", ()))
            raw["promise"] = Promise(**raw["promise"]) if raw.get("promise") else None
            config = cls(**raw)
            if sum(config.branch_sizes) != len(config.concepts):
                raise TypeError(f"branches {config.branches} do not add up to {len(config.concepts)} concepts")
            return config
        except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
            raise RequestError(f"{path} is not a safety module's configuration: {error}") from error
