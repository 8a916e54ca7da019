"""What a safety module is made for: shapes, concepts, widths. Saved as `config.json` beside its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

from saferedir.engines.errors import RequestError
from saferedir.engines.json_text import read_json
from saferedir.engines.manifest import KnownSha256, Name, Promise, Share, Side, Text, Width
from saferedir.engines.whole_file import write_bytes

#: Bytes.
LARGEST_CONFIG = 1_000_000
#: Features of a layer, heads of an attention.
Features = Annotated[int, Meta(ge=8, le=8192)]
Heads = Annotated[int, Meta(ge=1, le=64)]
#: Features of convolutions, an eighth of which gates them.
Channels = Annotated[int, Meta(ge=8, le=8192, multiple_of=8)]


class Stream(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One thing that the denoiser is told in words: so many tokens of one width. A pooled vector is a single token."""

    name: Name
    tokens: Side
    width: Width


class Concept(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One concept to forget, as training left it."""

    name: Name
    #: What is drawn in its place.
    replacement: Text
    #: The detector fires where the score reaches this, calibrated on validation trajectories.
    threshold: Share = 0.5


class SafetyConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Shapes of the model it protects, the concepts, and the widths of the network."""

    latent_channels: Annotated[int, Meta(ge=1, le=1024)]
    streams: Annotated[tuple[Stream, ...], Meta(min_length=1, max_length=8)]
    concepts: Annotated[tuple[Concept, ...], Meta(min_length=1, max_length=1000)]
    #: SHA-256 over the text encoder's weights (`fit.encoder_hashes`); a module fits only the text encoder it was trained with.
    text_encoder_sha256: KnownSha256 = ""
    #: The same of weights that fp16 rounds: without going through it. Empty where both are one.
    text_encoder_direct_sha256: KnownSha256 = ""
    #: SHA-256 over the UNet's parameters; another UNet is allowed and recorded.
    unet_sha256: KnownSha256 = ""
    #: How many concepts each branch of the network holds, in the order of `concepts`: first those trained together, then
    #: one number for every later addition. Empty means all in one.
    branches: Annotated[tuple[Annotated[int, Meta(ge=1, le=1000)], ...], Meta(max_length=1000)] = ()
    #: Steps during which detection rests after it fired.
    cooldown: Annotated[int, Meta(ge=0, le=1000)] = 2
    #: Of the three convolutional stages.
    convolutions: tuple[Channels, Channels, Channels] = (40, 80, 128)
    #: d, that tokens of every stream, and what a step shows, are projected to.
    features: Features = 128
    heads: Heads = 4
    #: What calibration promises about false alarms; None before calibration.
    promise: Promise | None = None
    #: How the module was made: command, seeds, versions, figures.
    provenance: dict[str, Any] = {}

    def __post_init__(self) -> None:
        if sum(self.branch_sizes) != len(self.concepts):
            raise ValueError(f"branches {self.branches} do not add up to {len(self.concepts)} concepts")
        for kind, names in (("concepts", self.concept_names), ("streams", [stream.name for stream in self.streams])):
            if twice := sorted({name for name in names if names.count(name) > 1}):
                raise ValueError(f"{kind} occur twice: {', '.join(twice)}")
        if self.features % self.heads:
            raise ValueError(f"heads is {self.heads}, which does not divide the {self.features} features")

    @property
    def branch_sizes(self) -> tuple[int, ...]:
        """Concepts a branch, for every branch."""
        return self.branches or (len(self.concepts),)

    @property
    def concept_names(self) -> list[str]:
        return [concept.name for concept in self.concepts]

    @property
    def tokens(self) -> int:
        """T, tokens of all streams."""
        return sum(stream.tokens for stream in self.streams)

    def save(self, path: Path) -> None:
        """Write it to `path` as a whole: a link there is replaced, and not followed.

        Raises:
            OutputError: it cannot be written.
        """
        write_bytes(path, msgspec.json.format(msgspec.json.encode(self), indent=1) + b"\n")

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
