"""The tensors of a denoising step, declared once; loop, graphs, examples, replay and the check of a bundle are written from it.

A new tensor is one line of `STEP`, and what gives it a value: the loop's host arrays (`saferedir.runtime.job`) or the graphs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum, Flag, auto

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


class Role(Enum):
    """When the host gives a tensor, and what becomes of it."""

    #: The same in every step of a run.
    CONSTANT = "constant"
    #: Another in every step, known before the first.
    PER_STEP = "per step"
    #: Taken and given: what a step gives is what the next one takes.
    STATE = "state"
    #: Given alone.
    RECORD = "record"


class Form(Flag):
    """The forms of a step, which differ in their tensors."""

    #: Without safety, guided and not.
    PLAIN = auto()
    #: Under safety, guided and not.
    PROTECTED = auto()
    #: Under the controller of the authors' released code, which moves both halves of guidance.
    PUBLISHED = auto()
    PUBLISHED_UNGUIDED = auto()
    #: Either controller by itself: the part of a protected step, and an engine of a bundle that holds the safety alone.
    SAFETY = auto()
    PUBLISHED_SAFETY = auto()


#: Dimensions: requests, channels and sides of the latent, tokens and width of the prompt, concepts.
BATCH = "batch"
LATENT = (BATCH, "channels", "height", "width")
PROMPT = (BATCH, "tokens", "prompt width")
CONCEPTS = (BATCH, "concepts")

Shape = tuple[int | str, ...]
#: Name of a dimension -> its size, or the name that it has in a graph where it varies.
Sizes = Mapping[str, int | str]


@dataclass(frozen=True)
class StepTensor:
    """One tensor of a step."""

    name: str
    #: numpy's name of the type.
    dtype: str
    shape: Shape
    role: Role
    forms: Form
    #: A likely value for examples; None for noise.
    example: float | None = None
    #: The loop keeps what every step gave, and not the last step's alone.
    every_step: bool = False

    @property
    def output(self) -> str:
        """Its name among a graph's outputs."""
        return f"next_{self.name}" if self.role is Role.STATE else self.name


#: The guidance scale up to which what a request asks for is read as it is.
USUAL_GUIDANCE = 5.0
#: Columns of `numbers`, what a sampler knows of a step. With z the latent, e the model's guided output, d the estimate of the
#: finished picture and n fresh noise:
#:
#:     d = from_latent z + from_output e        z' = of_latent z + of_denoised d + of_before d_before + of_noise n
#:
#: The latent times `input_scale` is what the denoiser sees. `noise_share` is sigma / (alpha + sigma) of the level that the step
#: starts from: 0 of a clean picture, 1 of noise. `known` is 1 where there was a step before, else 0, and
#: `denoised` is then to be zero.
#: `amplification` is by how much guidance exceeds the usual scale, as a share of that: guidance draws n + g (c - n), and at
#: the usual scale as much is drawn of c + amplification (c - n).
NUMBERS = (
    "input_scale", "from_latent", "from_output", "of_latent", "of_denoised", "of_before", "of_noise", "noise_share", "known",
    "amplification",
)  # fmt: skip

_STEPS = Form.PLAIN | Form.PROTECTED | Form.PUBLISHED | Form.PUBLISHED_UNGUIDED
_ALONE = Form.SAFETY | Form.PUBLISHED_SAFETY
_SAFE = Form.PROTECTED | Form.PUBLISHED | Form.PUBLISHED_UNGUIDED | _ALONE
_GUIDED = Form.PLAIN | Form.PROTECTED | Form.PUBLISHED
_PAIR = Form.PUBLISHED | Form.PUBLISHED_SAFETY
_PUBLISHED = _PAIR | Form.PUBLISHED_UNGUIDED
_F, _I, _B = "float32", "int32", "bool"

#: In the order in which graphs take and give them.
STEP = (
    StepTensor("latent", _F, LATENT, Role.STATE, _STEPS),
    StepTensor("latent", _F, LATENT, Role.PER_STEP, _ALONE),
    StepTensor("timestep", _F, (BATCH,), Role.PER_STEP, _STEPS | Form.PUBLISHED_SAFETY, example=500),
    StepTensor("numbers", _F, (BATCH, len(NUMBERS)), Role.PER_STEP, _STEPS | Form.SAFETY, example=1),
    #: The last step's estimate of the finished picture, guided; zero before the first.
    StepTensor("denoised", _F, LATENT, Role.STATE, _STEPS, example=0),
    StepTensor("denoised", _F, LATENT, Role.PER_STEP, Form.SAFETY, example=0),
    StepTensor("noise", _F, LATENT, Role.PER_STEP, _STEPS, example=0),
    #: The embedding in force.
    StepTensor("prompt", _F, PROMPT, Role.CONSTANT, Form.PLAIN),
    StepTensor("prompt", _F, PROMPT, Role.STATE, _SAFE),
    #: The other half of guidance.
    StepTensor("negative", _F, PROMPT, Role.CONSTANT, Form.PLAIN | Form.PROTECTED | Form.SAFETY),
    StepTensor("negative", _F, PROMPT, Role.STATE, _PAIR),
    StepTensor("guidance_scale", _F, (BATCH,), Role.CONSTANT, _GUIDED, example=5),
    #: How far the guided output takes the conditional's standard deviation, 0 to 1 (Lin et al. 2023, section 3.4).
    StepTensor("guidance_rescale", _F, (BATCH,), Role.CONSTANT, _GUIDED, example=0),
    StepTensor("original", _F, PROMPT, Role.CONSTANT, _SAFE),
    StepTensor("original_negative", _F, PROMPT, Role.CONSTANT, _PAIR),
    StepTensor("cooldown", _I, (BATCH,), Role.STATE, _SAFE, example=0, every_step=True),
    StepTensor("period", _I, (BATCH,), Role.CONSTANT, _SAFE, example=2),
    StepTensor("active", _B, CONCEPTS, Role.STATE, _SAFE, example=0),
    #: True as long as every step has said that all it computed is finite.
    StepTensor("ok", _B, (BATCH,), Role.STATE, _SAFE, example=1, every_step=True),
    StepTensor("enabled", _B, CONCEPTS, Role.CONSTANT, _PUBLISHED, example=1),
    #: Above 1 for a concept that is not looked for.
    StepTensor("threshold", _F, CONCEPTS, Role.CONSTANT, Form.PROTECTED | Form.SAFETY, example=0.5),
    StepTensor("alpha_scale", _F, CONCEPTS, Role.CONSTANT, _PUBLISHED, example=1.5),
    StepTensor("score", _F, CONCEPTS, Role.RECORD, _SAFE, every_step=True),
    StepTensor("fired", _B, CONCEPTS, Role.RECORD, _SAFE, every_step=True),
    StepTensor("token_mask", _F, (BATCH, "concepts", "tokens"), Role.RECORD, _SAFE),
)


def step_tensors(form: Form) -> tuple[StepTensor, ...]:
    """The tensors of a step of that form."""
    return tuple(tensor for tensor in STEP if form in tensor.forms)


def step_inputs(form: Form) -> tuple[str, ...]:
    """Names of what a step of that form takes, in order."""
    return tuple(tensor.name for tensor in step_tensors(form) if tensor.role is not Role.RECORD)


def step_outputs(form: Form) -> tuple[str, ...]:
    """Names of what a step of that form gives, in order."""
    return tuple(tensor.output for tensor in step_tensors(form) if tensor.role in (Role.STATE, Role.RECORD))


def form_of_step(step: str, *, published: bool) -> Form:
    """The form of an engine of one of the kinds of `STEPS`, by its controller."""
    if step in PLAIN_STEPS:
        return Form.PLAIN
    if not published:
        return Form.PROTECTED
    return Form.PUBLISHED_UNGUIDED if step == "step_unguided" else Form.PUBLISHED


#: Name, type and shape.
Declared = tuple[str, str, Shape]
#: Engines that are no steps -> what they take and give.
_OTHERS: dict[str, tuple[tuple[Declared, ...], tuple[Declared, ...]]] = {
    "text_encoder": ((("input_ids", _I, (BATCH, "tokens")),), (("prompt_embeds", _F, PROMPT),)),
    "vae_decoder": ((("latent", _F, LATENT),), (("image", _F, (BATCH, 3, "picture height", "picture width")),)),
    "published_network": (
        (("latent", _F, LATENT), ("prompt_embeds", _F, PROMPT), ("timestep", _F, (BATCH,))),
        (
            ("logits", _F, (BATCH, 2)),
            ("delta", _F, PROMPT),
            ("mask", _F, (BATCH, "tokens")),
            ("alpha", _F, (BATCH, "tokens", 1)),
        ),
    ),
}


def declared(kind: str, sizes: Sizes, *, published: bool) -> tuple[tuple[Declared, ...], tuple[Declared, ...]]:
    """What an engine of that kind takes and gives, with these sizes of all dimensions but the batch."""
    if kind in _OTHERS:
        inputs, outputs = _OTHERS[kind]
    else:
        form = Form.PUBLISHED_SAFETY if kind == "safety" else form_of_step(kind, published=published)
        tensors = step_tensors(form)
        inputs = tuple((t.name, t.dtype, t.shape) for t in tensors if t.role is not Role.RECORD)
        outputs = tuple((t.output, t.dtype, t.shape) for t in tensors if t.role in (Role.STATE, Role.RECORD))
    return tuple(_sized(inputs, sizes)), tuple(_sized(outputs, sizes))


def _sized(tensors: tuple[Declared, ...], sizes: Sizes) -> Iterator[Declared]:
    for name, dtype, shape in tensors:
        yield name, dtype, tuple(sizes.get(size, size) if isinstance(size, str) else size for size in shape)


def engine_outputs(kind: str) -> tuple[str, ...]:
    """Names of what an engine that is no step gives, in order."""
    return tuple(name for name, _, _ in _OTHERS[kind][1])
