"""The manifest of a bundle, `bundle.json`: what the engines are, what they take and give, and what made them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from saferedir.engines.errors import BundleAlteredError, BundleSchemaError

SCHEMA_VERSION = 4
MANIFEST_FILE = "bundle.json"
TOKENIZER_FILE = "tokenizer.json"

#: The denoising step: protected, with and without guidance, and the same of an operator who switched the safety off.
PROTECTED_STEPS = ("step", "step_unguided")
PLAIN_STEPS = ("plain_step", "plain_step_unguided")
STEPS = (*PROTECTED_STEPS, *PLAIN_STEPS)
#: Engines of one size of picture each; those of another than the model's own are called `step@96x64`.
SIZED_ENGINES = ("vae_decoder", *STEPS)
#: Engines of a bundle that draws.
DRAWING_ENGINES = ("text_encoder", *SIZED_ENGINES)
#: Engines of a bundle that holds the safety of a published checkpoint alone.
SAFETY_ENGINES = ("safety", "published_network")
#: `published` is the controller of the authors' released code: it looks after the UNet call, decides by argmax and moves both
#: halves of guidance.
PUBLISHED = "published"
CONTROLLERS = ("saferedir", PUBLISHED)


@dataclass(frozen=True)
class TensorInfo:
    """Name, numpy dtype name and shape of an engine's input or output; a dynamic dimension is its name."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class EngineInfo:
    """One ONNX graph of the bundle. `weights` lists the external data files that it reads."""

    file: str
    weights: tuple[str, ...]
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]


@dataclass(frozen=True)
class FileInfo:
    """Integrity of a file of the bundle."""

    sha256: str
    bytes: int


@dataclass(frozen=True)
class ModelInfo:
    """Shapes and constants of the model. Sizes are of the latent; a picture is `vae_scale_factor` times larger."""

    latent_channels: int
    latent_height: int
    latent_width: int
    prompt_tokens: int
    prompt_width: int
    vae_scale_factor: int
    vae_scaling_factor: float
    prediction_type: str
    text_encoder_sha256: str
    unet_sha256: str
    #: Words of textual inversions -> the tokens that each stands for.
    added_words: dict[str, tuple[str, ...]] = field(default_factory=dict)
    #: Height and width of the latents that there are engines for, beside the model's own.
    further_sizes: tuple[tuple[int, int], ...] = ()

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


def sized(name: str, size: tuple[int, int], own: tuple[int, int]) -> str:
    """The name of an engine for latents of height and width `size`, where `own` is the model's own size."""
    return name if size == own else f"{name}@{size[0]}x{size[1]}"


def drawing_engines(sizes: Sequence[tuple[int, int]]) -> tuple[str, ...]:
    """Names of all engines of a bundle that draws latents of these heights and widths, the model's own first."""
    return ("text_encoder", *(sized(name, size, sizes[0]) for size in sizes for name in SIZED_ENGINES))


def kind(engine: str) -> str:
    """What the engine does, whatever its size: `step` of `step@96x64`."""
    return engine.partition("@")[0]


@dataclass(frozen=True)
class SchedulerInfo:
    """Noise schedule and timestep spacing, in diffusers' terms."""

    kind: str
    num_train_timesteps: int
    beta_start: float
    beta_end: float
    beta_schedule: str
    timestep_spacing: str
    steps_offset: int
    set_alpha_to_one: bool
    #: Of a latent consistency model: the number of steps it was distilled for, and the scale of its boundary condition.
    original_inference_steps: int = 50
    timestep_scaling: float = 10.0
    #: diffusers' class that the model's folder asks for, where it is drawn with another sampler; empty where it is not.
    in_place_of: str = ""
    rescale_betas_zero_snr: bool = False
    #: Of euler: how its noise levels are spaced, between which ones, and which one it ends at (zero or sigma_min).
    use_karras_sigmas: bool = False
    use_exponential_sigmas: bool = False
    sigma_min: float | None = None
    sigma_max: float | None = None
    final_sigmas_type: str = "zero"


@dataclass(frozen=True)
class ConceptInfo:
    """A concept that the safety engine knows, with the threshold and strength it was trained and calibrated for."""

    name: str
    replacement: str
    #: None where the engine decides by argmax.
    threshold: float | None
    alpha_scale: float


@dataclass(frozen=True)
class PromiseInfo:
    """What the thresholds promise: the safety fires on at most `rate` of benign pictures, with `confidence`.

    Calibrated on that many `pictures` of `prompts`, drawn in `steps` steps with `guidance_scale`, of which `allowed` fire.
    """

    rate: float
    confidence: float
    pictures: int
    allowed: int
    steps: int
    guidance_scale: float
    prompts: str

    def __str__(self) -> str:
        return (
            f"fires on at most {100 * self.rate:g} % of benign pictures, with {100 * self.confidence:g} % confidence "
            f"({self.prompts}; {self.steps} steps, guidance {self.guidance_scale:g}; {self.allowed} of {self.pictures} "
            "calibration pictures fire)"
        )


@dataclass(frozen=True)
class SafetyInfo:
    """What the safety engine was made for, and its concepts in the engine's order."""

    text_encoder_sha256: str
    #: UNet it was trained with; another one is allowed (transfer) and shows by this differing from the model's.
    unet_sha256: str
    prompt_width: int
    latent_channels: int
    cooldown: int
    concepts: tuple[ConceptInfo, ...]
    #: None where the thresholds were not calibrated (and in bundles of schema 1).
    promise: PromiseInfo | None = None
    #: Of the published controller: displacements are multiplied by the mask once more.
    mask_again: bool = False


@dataclass(frozen=True)
class PrecisionInfo:
    """How weights are stored, what the model computes in, and what verification demands of the engines."""

    storage: str
    compute: str
    #: Worst error allowed against the reference in fp32, relative to an output's largest magnitude where that exceeds 1.
    tolerance: float = 1e-4
    #: Share of the safety's decisions that equal the reference's.
    decisions: float = 1.0
    #: Of the worst picture, in dB; None where the tolerance says enough.
    psnr: float | None = None


@dataclass(frozen=True)
class Manifest:
    """Everything that `bundle.json` says."""

    schema_version: int
    name: str
    model_family: str
    controller: str
    max_batch: int
    #: None, as the scheduler, in a bundle that holds a safety alone.
    model: ModelInfo | None
    scheduler: SchedulerInfo | None
    safety: SafetyInfo
    precision: PrecisionInfo
    made_with: dict[str, str]
    engines: dict[str, EngineInfo]
    files: dict[str, FileInfo]

    @property
    def required_engines(self) -> tuple[str, ...]:
        """Engines that a bundle of this model must have."""
        return SAFETY_ENGINES if self.model is None else drawing_engines(self.model.sizes)

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str, source: str) -> Manifest:
        """Parse and check a manifest; `source` is named in errors.

        Raises:
            BundleSchemaError: the schema is newer than this version reads.
            BundleAlteredError: not JSON, or a field is missing, unknown or of the wrong type.
        """
        try:
            raw = json.loads(text)
        except json.JSONDecodeError as error:
            raise BundleAlteredError(f"{source} is not JSON ({error}); export the bundle again") from error
        version = raw.get("schema_version") if isinstance(raw, dict) else None
        if not isinstance(version, int):
            raise BundleAlteredError(f"{source} states no schema_version; it is no bundle manifest")
        if version > SCHEMA_VERSION:
            raise BundleSchemaError(
                f"{source} is of schema {version}, this saferedir reads up to {SCHEMA_VERSION}; upgrade saferedir"
            )
        if (controller := raw.get("controller")) not in CONTROLLERS:
            raise BundleAlteredError(f"{source} states controller {controller!r}; expected one of {', '.join(CONTROLLERS)}")
        if (raw.get("model") is None) != (raw.get("scheduler") is None):
            raise BundleAlteredError(f"{source} states one of model and scheduler; expected both, or neither")
        try:
            return cls(
                **_scalars(cls, raw),
                model=_model(raw["model"]) if raw["model"] else None,
                scheduler=SchedulerInfo(**raw["scheduler"]) if raw["scheduler"] else None,
                safety=SafetyInfo(
                    **{k: v for k, v in raw["safety"].items() if k not in ("concepts", "promise")},
                    concepts=tuple(ConceptInfo(**concept) for concept in raw["safety"]["concepts"]),
                    promise=PromiseInfo(**raw["safety"]["promise"]) if raw["safety"].get("promise") else None,
                ),
                precision=PrecisionInfo(**raw["precision"]),
                made_with=dict(raw["made_with"]),
                engines={name: _engine(entry) for name, entry in raw["engines"].items()},
                files={name: FileInfo(**entry) for name, entry in raw["files"].items()},
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise BundleAlteredError(f"{source} does not have the fields of schema {SCHEMA_VERSION}: {error}") from error


def _scalars(cls: type[Any], raw: dict[str, Any]) -> dict[str, Any]:
    plain = {field.name for field in fields(cls) if field.type in ("int", "str")}
    return {name: raw[name] for name in plain}


def _model(raw: dict[str, Any]) -> ModelInfo:
    words = {word: tuple(tokens) for word, tokens in raw.get("added_words", {}).items()}
    sizes = tuple((height, width) for height, width in raw.get("further_sizes", ()))
    return ModelInfo(**{**raw, "added_words": words, "further_sizes": sizes})


def _engine(raw: dict[str, Any]) -> EngineInfo:
    return EngineInfo(raw["file"], tuple(raw["weights"]), _tensors(raw["inputs"]), _tensors(raw["outputs"]))


def _tensors(raw: list[dict[str, Any]]) -> tuple[TensorInfo, ...]:
    return tuple(TensorInfo(entry["name"], entry["dtype"], tuple(entry["shape"])) for entry in raw)
