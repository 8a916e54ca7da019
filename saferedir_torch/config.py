"""What a safety module is made for: shapes, concepts, widths. Saved as `config.json` beside its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

from saferedir.engines.errors import RequestError
from saferedir.engines.json_text import read_json
from saferedir.engines.manifest import KnownSha256, Name, Positive, Promise, Share, Side, Text, Width

#: Bytes.
LARGEST_CONFIG = 1_000_000
#: How many timesteps the noise schedule is stated at.
NOISE_SHARES = 9
#: Features of a layer, heads of an attention.
Features = Annotated[int, Meta(ge=1, le=8192)]
Heads = Annotated[int, Meta(ge=1, le=64)]
#: Features of convolutions, which are normalised in groups of eighths.
Channels = Annotated[int, Meta(ge=8, le=8192, multiple_of=8)]
Widths = tuple[Channels, Channels, Channels]


class Concept(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One concept to forget, as training left it."""

    name: Name
    #: What is drawn in its place.
    replacement: Text
    #: The detector fires where the score reaches this, calibrated on validation trajectories.
    threshold: Share = 0.5
    #: `s` of the redirection formula; the value trained at.
    alpha_scale: Positive = 1.5


class SafetyConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Shapes of the model it protects, the concepts, and the widths of the network."""

    latent_channels: Annotated[int, Meta(ge=1, le=1024)]
    #: T, prompt tokens.
    prompt_tokens: Side
    #: D, prompt embedding width.
    prompt_width: Width
    concepts: Annotated[tuple[Concept, ...], Meta(min_length=1, max_length=1000)]
    #: SHA-256 over the text encoder's weights (`fit.encoder_hashes`); a module fits only the text encoder it was trained with.
    text_encoder_sha256: KnownSha256 = ""
    #: The same of weights that fp16 rounds: without going through it. Empty where both are one.
    text_encoder_direct_sha256: KnownSha256 = ""
    #: SHA-256 over the UNet's parameters; another UNet is allowed and recorded.
    unet_sha256: KnownSha256 = ""
    #: Noise shares of the model's schedule at equidistant timesteps from the first to the last; the module reads timesteps, and
    #: fits no other schedule. Empty where that is not known.
    noise_shares: tuple[Share, ...] = ()
    #: How many concepts each branch of the network holds, in the order of `concepts`: first those trained together, then
    #: one number for every later addition. Empty means all in one.
    branches: Annotated[tuple[Annotated[int, Meta(ge=1, le=1000)], ...], Meta(max_length=1000)] = ()
    #: Steps during which detection rests after it fired.
    cooldown: Annotated[int, Meta(ge=0, le=1000)] = 2
    #: It fires again at this share of its threshold: a run in which it was seen is watched more closely.
    vigilance: Share = 0.75
    #: Of a concept that fires although it is active already, the embedding becomes that of a safe prompt, which asks for what
    #: is drawn in its place and for little else.
    refuge: bool = False
    #: What a step shows is scored without the prompt as well, which strange words could speak against it.
    alone: bool = False
    latent_widths: Widths = (64, 128, 256)
    latent_features: Features = 512
    picture_widths: Widths = (48, 96, 128)
    picture_features: Features = 256
    timestep_frequencies: Features = 320
    timestep_features: Features = 64
    context_heads: Heads = 4
    classifier_width: Features = 256
    words_width: Features = 64
    redirector_width: Features = 256
    redirector_heads: Heads = 4
    adapter_rank: Features = 32
    #: What calibration promises about false alarms; None before calibration.
    promise: Promise | None = None
    #: How the module was made: command, seeds, versions, figures.
    provenance: dict[str, Any] = {}

    def __post_init__(self) -> None:
        if len(self.noise_shares) not in (0, NOISE_SHARES):
            raise ValueError(f"noise_shares are {len(self.noise_shares)}; expected {NOISE_SHARES}, or none")
        if sum(self.branch_sizes) != len(self.concepts):
            raise ValueError(f"branches {self.branches} do not add up to {len(self.concepts)} concepts")
        names = self.concept_names
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"concepts occur twice: {', '.join(twice)}")
        if self.timestep_frequencies % 2:
            raise ValueError(f"timestep_frequencies is {self.timestep_frequencies}; expected an even number")
        if self.prompt_width % self.redirector_heads:
            raise ValueError(
                f"redirector_heads is {self.redirector_heads}, which does not divide the prompt's {self.prompt_width}"
            )

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
        path.write_bytes(msgspec.json.format(msgspec.json.encode(self), indent=1) + b"\n")

    @classmethod
    def load(cls, path: Path) -> SafetyConfig:
        """The configuration in `path`.

        Raises:
            RequestError: the file cannot be read, is not JSON, or a field is missing, unknown, there twice, or of another type
                or value.
        """
        try:
            with path.open("rb") as file:
                data = file.read(LARGEST_CONFIG + 1)
        except OSError as error:
            raise RequestError(f"{path} is not a safety module's configuration: {error}") from error
        return read_json(data, cls, str(path), RequestError, largest=LARGEST_CONFIG)
