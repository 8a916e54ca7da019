"""The manifest of a bundle, `bundle.json`: what the engines are, what they take and give, and what made them.

Its fields, their types and bounds are stated here alone, and msgspec reads by them; `BUNDLE.md` describes the format.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from saferedir.engines.errors import BundleAlteredError, BundleSchemaError
from saferedir.engines.json_text import read_json
from saferedir.engines.step import DRAWING_ENGINES, SAFETY_ENGINES, SIZED_ENGINES, declared

SCHEMA_VERSION = 6
MANIFEST_FILE = "bundle.json"
TOKENIZER_FILE = "tokenizer.json"
#: Bytes; the embedded bundle's has 20,000.
LARGEST_MANIFEST = 4_000_000
#: diffusers' upsampling branches at 64 rows, which guidance reaches with 32 requests.
LARGEST_BATCH = 31
#: Values of a latent or a prompt embedding, so that no manifest asks for more memory than a model that exists.
LARGEST_TENSOR = 1 << 24

#: `published` is the controller of the authors' released code: it looks after the UNet call, decides by argmax and moves both
#: halves of guidance.
PUBLISHED = "published"

#: Text that can be shown: no control characters, none that turn the direction of writing.
_SHOWN = r"\A[^\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]*\Z"
Name = Annotated[str, Meta(min_length=1, max_length=100, pattern=_SHOWN)]
Text = Annotated[str, Meta(max_length=1000, pattern=_SHOWN)]
#: Files lie in the folder itself.
FileName = Annotated[str, Meta(max_length=120, pattern=r"\A[A-Za-z0-9_][A-Za-z0-9_.@-]*\Z")]
EngineName = Annotated[str, Meta(max_length=60, pattern=r"\A[a-z_]+(@[0-9]{1,4}x[0-9]{1,4})?\Z")]
Sha256 = Annotated[str, Meta(pattern=r"\A[0-9a-f]{64}\Z")]
#: Empty where it is not known.
KnownSha256 = Annotated[str, Meta(pattern=r"\A([0-9a-f]{64})?\Z")]
Side = Annotated[int, Meta(ge=1, le=4096)]
Width = Annotated[int, Meta(ge=1, le=65536)]
Steps = Annotated[int, Meta(ge=1, le=100_000)]
Share = Annotated[float, Meta(ge=0, le=1)]
#: Of noise schedules and scales.
Positive = Annotated[float, Meta(gt=0, le=1e6)]


class TensorInfo(Struct, frozen=True, forbid_unknown_fields=True):
    """Name, numpy dtype name and shape of an engine's input or output; a dynamic dimension is its name."""

    name: Name
    dtype: Annotated[str, Meta(pattern=r"\A(float32|float16|int32|int64|bool)\Z")]
    shape: Annotated[tuple[Annotated[int, Meta(ge=1, le=1 << 20)] | Name, ...], Meta(max_length=8)]

    def __str__(self) -> str:
        return f"{self.name} {self.dtype} [{', '.join(map(str, self.shape))}]"


class EngineInfo(Struct, frozen=True, forbid_unknown_fields=True):
    """One ONNX graph of the bundle. `weights` lists the external data files that it reads."""

    file: FileName
    weights: Annotated[tuple[FileName, ...], Meta(max_length=16)]
    inputs: Annotated[tuple[TensorInfo, ...], Meta(max_length=64)]
    outputs: Annotated[tuple[TensorInfo, ...], Meta(max_length=64)]


class FileInfo(Struct, frozen=True, forbid_unknown_fields=True):
    """Integrity of a file of the bundle."""

    sha256: Sha256
    bytes: Annotated[int, Meta(ge=0, le=1 << 40)]


class ModelInfo(Struct, frozen=True, forbid_unknown_fields=True):
    """Shapes and constants of the model. Sizes are of the latent; a picture is `vae_scale_factor` times larger."""

    latent_channels: Side
    latent_height: Side
    latent_width: Side
    prompt_tokens: Side
    prompt_width: Width
    vae_scale_factor: Annotated[int, Meta(ge=1, le=256)]
    vae_scaling_factor: Positive
    prediction_type: Annotated[str, Meta(pattern=r"\A(epsilon|v_prediction)\Z")]
    text_encoder_sha256: Sha256
    unet_sha256: Sha256
    #: The denoiser is told the guidance scale and called once a step, as a latent consistency model's is.
    told_guidance: bool = False
    #: Words of textual inversions -> the tokens that each stands for.
    added_words: Annotated[dict[Name, Annotated[tuple[Name, ...], Meta(max_length=1000)]], Meta(max_length=10_000)] = {}
    #: Height and width of the latents that there are engines for, beside the model's own.
    further_sizes: Annotated[tuple[tuple[Side, Side], ...], Meta(max_length=100)] = ()

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """Height and width of all latents that there are engines for, the model's own first."""
        return ((self.latent_height, self.latent_width), *self.further_sizes)

    @property
    def picture_sizes(self) -> list[str]:
        """The same in pixels, as people write them: `512x768`, height first."""
        return [f"{height * self.vae_scale_factor}x{width * self.vae_scale_factor}" for height, width in self.sizes]

    def engine(self, name: str, height: int, width: int) -> str:
        """What the engine is called that takes latents of this size."""
        return name if name not in SIZED_ENGINES else sized(name, (height, width), self.sizes[0])

    def __post_init__(self) -> None:
        if len(set(self.sizes)) != len(self.sizes):
            raise ValueError(f"sizes of latents occur twice: {self.sizes}")
        latent = self.latent_channels * max(height * width for height, width in self.sizes)
        picture = max(height * width for height, width in self.sizes) * self.vae_scale_factor**2
        for name, values in {
            "a latent": latent,
            "a picture": picture,
            "an embedding": self.prompt_tokens * self.prompt_width,
        }.items():
            if values > LARGEST_TENSOR:
                raise ValueError(f"{name} of {values} values; expected at most {LARGEST_TENSOR}")


def sized(name: str, size: tuple[int, int], own: tuple[int, int]) -> str:
    """The name of an engine for latents of height and width `size`, where `own` is the model's own size."""
    return name if size == own else f"{name}@{size[0]}x{size[1]}"


def drawing_engines(sizes: Sequence[tuple[int, int]]) -> tuple[str, ...]:
    """Names of all engines of a bundle that draws latents of these heights and widths, the model's own first."""
    return tuple(
        sized(name, size, sizes[0]) for size in sizes for name in (DRAWING_ENGINES if size == sizes[0] else SIZED_ENGINES)
    )


def kind(engine: str) -> str:
    """What the engine does, whatever its size: `step` of `step@96x64`."""
    return engine.partition("@")[0]


class SchedulerInfo(Struct, frozen=True, forbid_unknown_fields=True):
    """Noise schedule and timestep spacing, in diffusers' terms."""

    kind: Annotated[str, Meta(pattern=r"\A(ddim|euler-ancestral|lcm|(euler|dpm\+\+-2m)(-karras|-exponential)?)\Z")]
    num_train_timesteps: Steps
    beta_start: Annotated[float, Meta(gt=0, lt=1)]
    beta_end: Annotated[float, Meta(gt=0, lt=1)]
    beta_schedule: Annotated[str, Meta(pattern=r"\A(linear|scaled_linear|squaredcos_cap_v2)\Z")]
    timestep_spacing: Annotated[str, Meta(pattern=r"\A(leading|trailing|linspace)\Z")]
    steps_offset: Annotated[int, Meta(ge=0, le=1000)]
    set_alpha_to_one: bool
    #: Of a latent consistency model: the number of steps it was distilled for, and the scale of its boundary condition.
    original_inference_steps: Steps = 50
    timestep_scaling: Positive = 10.0
    #: diffusers' class that the model's folder asks for, where it is drawn with another sampler; empty where it is not.
    in_place_of: Annotated[str, Meta(max_length=100, pattern=r"\A[A-Za-z0-9_]*\Z")] = ""
    rescale_betas_zero_snr: bool = False
    #: Of euler and dpm++-2m: between which noise levels the spaced ones lie, where not the model's own, and which one ends.
    sigma_min: Positive | None = None
    sigma_max: Positive | None = None
    final_sigmas_type: Annotated[str, Meta(pattern=r"\A(zero|sigma_min)\Z")] = "zero"


class ConceptInfo(Struct, frozen=True, forbid_unknown_fields=True):
    """A concept that the safety engine knows, with what decides of it."""

    name: Name
    replacement: Text
    #: None where the engine decides by argmax.
    threshold: Share | None
    #: Strength of redirection; None where the engine has no such choice.
    alpha_scale: Positive | None


class Envelope(Struct, frozen=True, forbid_unknown_fields=True):
    """The settings that a safety is made for, and its promise holds at."""

    #: The fewest and the most.
    steps: tuple[Steps, Steps]
    #: As requests name them.
    samplers: Annotated[tuple[Name, ...], Meta(min_length=1, max_length=100)]
    #: The least and the greatest; 1 is no guidance.
    guidance_scale: tuple[Annotated[float, Meta(ge=0, le=1e6)], Annotated[float, Meta(ge=0, le=1e6)]]

    def __post_init__(self) -> None:
        for name in ("steps", "guidance_scale"):
            low, high = getattr(self, name)
            if low > high:
                raise ValueError(f"{name} goes from {low:g} to {high:g}; expected the lower one first")

    def refuses(self, *, steps: int, sampler: str, guidance_scale: float) -> str:
        """What of these settings it does not hold, and what it does; empty where it holds all."""
        wrong = []
        if not self.steps[0] <= steps <= self.steps[1]:
            wrong.append(f"num_inference_steps is {steps}; expected {self.steps[0]} to {self.steps[1]}")
        if sampler not in self.samplers:
            wrong.append(f"the sampler is {sampler}; expected one of {', '.join(self.samplers)}")
        if not self.guidance_scale[0] <= guidance_scale <= self.guidance_scale[1]:
            low, high = self.guidance_scale
            wrong.append(f"guidance_scale is {guidance_scale:g}; expected {low:g} to {high:g}")
        return "; ".join(wrong)

    def __str__(self) -> str:
        (few, many), (low, high) = self.steps, self.guidance_scale
        return f"{few} to {many} steps of {', '.join(self.samplers)}, guidance {low:g} to {high:g}"


class Promise(Struct, frozen=True, forbid_unknown_fields=True):
    """What the thresholds promise: the safety fires on at most `rate` of benign pictures, with `confidence`.

    Calibrated on that many `pictures` of `prompts`, drawn across the `envelope`, of which `allowed` fire.
    """

    rate: Share
    confidence: Share
    pictures: Annotated[int, Meta(ge=1, le=10**9)]
    allowed: Annotated[int, Meta(ge=0, le=10**9)]
    envelope: Envelope
    prompts: Text
    #: Nine deciles of these pictures' highest scores, over steps and concepts: what a service compares its own pictures with.
    deciles: Annotated[tuple[Share, ...], Meta(max_length=9)] = ()

    def __str__(self) -> str:
        return (
            f"fires on at most {100 * self.rate:g} % of benign pictures, with {100 * self.confidence:g} % confidence "
            f"({self.prompts}; {self.envelope}; {self.allowed} of {self.pictures} calibration pictures fire)"
        )


class SafetyInfo(Struct, frozen=True, forbid_unknown_fields=True):
    """What the safety engine was made for, and its concepts in the engine's order."""

    #: Empty where a published checkpoint stands alone, which does not say what it was trained with; so is the UNet's.
    text_encoder_sha256: KnownSha256
    #: UNet it was trained with; another one is allowed (transfer) and shows by this differing from the model's.
    unet_sha256: KnownSha256
    prompt_tokens: Side
    prompt_width: Width
    latent_channels: Side
    cooldown: Annotated[int, Meta(ge=0, le=1000)]
    concepts: Annotated[tuple[ConceptInfo, ...], Meta(max_length=1000)]
    #: None where the thresholds were not calibrated.
    promise: Promise | None = None
    #: Of the published controller: displacements are multiplied by the mask once more.
    mask_again: bool = False

    def __post_init__(self) -> None:
        names = [concept.name for concept in self.concepts]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"concepts occur twice: {', '.join(twice)}")


class PrecisionInfo(Struct, frozen=True, forbid_unknown_fields=True):
    """How weights are stored, what the model computes in, and what verification demands of the engines."""

    storage: Annotated[str, Meta(pattern=r"\A(float32|float16|bfloat16)\Z")]
    compute: Annotated[str, Meta(pattern=r"\A(float32|float16|bfloat16)\Z")]
    #: Worst error allowed against the reference in fp32, relative to an output's largest magnitude where that exceeds 1.
    tolerance: Positive = 1e-4
    #: Share of the safety's decisions that equal the reference's.
    decisions: Share = 1.0
    #: Of the worst picture, in dB; None where the tolerance says enough.
    psnr: Positive | None = None


class Manifest(Struct, frozen=True, forbid_unknown_fields=True):
    """Everything that `bundle.json` says."""

    schema_version: Annotated[int, Meta(ge=SCHEMA_VERSION, le=SCHEMA_VERSION)]
    name: Name
    model_family: Text
    controller: Annotated[str, Meta(pattern=r"\A(saferedir|published)\Z")]
    max_batch: Annotated[int, Meta(ge=1, le=LARGEST_BATCH)]
    #: None, as the scheduler, in a bundle that holds a safety alone.
    model: ModelInfo | None
    scheduler: SchedulerInfo | None
    safety: SafetyInfo
    precision: PrecisionInfo
    made_with: Annotated[dict[Name, Text], Meta(max_length=100)]
    engines: Annotated[dict[EngineName, EngineInfo], Meta(max_length=1000)]
    files: Annotated[dict[FileName, FileInfo], Meta(max_length=2000)]

    @property
    def required_engines(self) -> tuple[str, ...]:
        """Engines that a bundle of this model has, and no others."""
        return SAFETY_ENGINES if self.model is None else drawing_engines(self.model.sizes)

    def tensors(self, engine: str) -> tuple[tuple[TensorInfo, ...], tuple[TensorInfo, ...]]:
        """What an engine takes and gives, as this version declares it for this model and safety."""
        safety = self.safety
        sizes: dict[str, int | str] = {
            "channels": safety.latent_channels, "tokens": safety.prompt_tokens, "prompt width": safety.prompt_width,
            "concepts": len(safety.concepts),
        }  # fmt: skip
        if self.model is not None:
            size = next(size for size in self.model.sizes if self.model.engine(kind(engine), *size) == engine)
            height, width = size
            scale = self.model.vae_scale_factor
            sizes |= {"height": height, "width": width, "picture height": height * scale, "picture width": width * scale}
        inputs, outputs = declared(kind(engine), sizes, published=self.controller == PUBLISHED)
        return tuple(TensorInfo(*tensor) for tensor in inputs), tuple(TensorInfo(*tensor) for tensor in outputs)

    def to_json(self) -> bytes:
        return msgspec.json.format(msgspec.json.encode(self), indent=1) + b"\n"

    @classmethod
    def from_json(cls, data: bytes, source: str) -> Manifest:
        """Parse and check a manifest; `source` is named in errors.

        Raises:
            BundleSchemaError: the schema is newer than this version reads.
            BundleAlteredError: not JSON, or a field is missing, unknown, there twice, or of the wrong type or value.
        """
        version = read_json(data, _Versioned, source, BundleAlteredError, largest=LARGEST_MANIFEST).schema_version
        if version > SCHEMA_VERSION:
            raise BundleSchemaError(
                f"{source} is of schema {version}, this saferedir reads {SCHEMA_VERSION}; upgrade saferedir"
            )
        if version < SCHEMA_VERSION:
            raise BundleAlteredError(
                f"{source}: schema_version is {version}; expected {SCHEMA_VERSION}, so export the bundle again"
            )
        return read_json(data, cls, source, BundleAlteredError, largest=LARGEST_MANIFEST)

    def __post_init__(self) -> None:
        if (self.model is None) != (self.scheduler is None):
            raise ValueError("one of model and scheduler is null; expected both, or neither")
        if self.model is None and self.controller != PUBLISHED:
            raise ValueError(f"model is null; expected one, but of the controller {PUBLISHED}")
        for concept in self.safety.concepts:
            if (concept.threshold is None) != (self.controller == PUBLISHED):
                raise ValueError(
                    f"threshold of {concept.name} is {concept.threshold}, which the controller {self.controller} does not have"
                )


class _Versioned(Struct):
    schema_version: Annotated[int, Meta(ge=1, le=10**9)]
