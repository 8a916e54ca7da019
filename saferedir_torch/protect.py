"""Protects a stock diffusers pipeline: `with protect(pipeline, safety) as guard: pipeline(...)`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from saferedir.engines.errors import NonFiniteError, SafetyError, SafetyMismatchError
from saferedir.engines.plain_letters import in_plain_letters
from saferedir_torch.controller import Controller, Policy, State, Verdict
from saferedir_torch.expectation import noise_beside
from saferedir_torch.safety_module import SafetyModule, parameters_sha256

#: Samplers whose next latent comes of the prediction alone, without fresh noise (DDIM with eta 0).
DETERMINISTIC = frozenset({
    "DDIMScheduler", "PNDMScheduler", "EulerDiscreteScheduler", "HeunDiscreteScheduler", "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler", "UniPCMultistepScheduler", "DEISMultistepScheduler", "LMSDiscreteScheduler",
})  # fmt: skip


#: How far signal shares may lie from the module's, which are rounded on disk.
SCHEDULE_TOLERANCE = 1e-3


@dataclass(frozen=True, kw_only=True)
class EagerPolicy:
    """The operator's choices; what is left out comes from the safety module's configuration."""

    #: Concepts to look for; None means all.
    enabled: tuple[str, ...] | None = None
    #: Concept name -> threshold.
    thresholds: Mapping[str, float] = field(default_factory=dict)
    #: Concept name -> alpha_scale.
    alpha_scales: Mapping[str, float] = field(default_factory=dict)
    #: K, steps of rest after firing.
    cooldown: int | None = None

    def resolve(self, module: SafetyModule, batch: int, device: torch.device) -> Policy:
        """The policy of `batch` requests as tensors.

        Raises:
            SafetyError: a name that the module has no concept of.
        """
        config = module.config
        unknown = {*(self.enabled or ()), *self.thresholds, *self.alpha_scales} - set(config.concept_names)
        if unknown:
            raise SafetyError(f"unknown concepts {sorted(unknown)}; the module knows {config.concept_names}")
        enabled = [self.enabled is None or concept.name in self.enabled for concept in config.concepts]
        thresholds = [self.thresholds.get(concept.name, concept.threshold) for concept in config.concepts]
        scales = [self.alpha_scales.get(concept.name, concept.alpha_scale) for concept in config.concepts]
        period = config.cooldown if self.cooldown is None else self.cooldown
        return Policy(
            period=torch.full((batch,), period, dtype=torch.int32, device=device),
            enabled=torch.tensor(enabled, device=device).expand(batch, -1),
            threshold=torch.tensor(thresholds, device=device).expand(batch, -1),
            alpha_scale=torch.tensor(scales, device=device).expand(batch, -1),
        )


@dataclass
class Generation:
    """One call of the pipeline: the state of its requests and what was seen in every step.

    `timesteps` has one float a step; `verdicts` one `Verdict` a step, each for the whole batch.
    """

    original: Tensor
    guided: bool
    state: State
    policy: Policy
    timesteps: list[float] = field(default_factory=list)
    verdicts: list[Verdict] = field(default_factory=list)
    cooldowns: list[Tensor] = field(default_factory=list)
    #: What the UNet predicted last, guided, [B, C, h, w]; None before that, and where fresh noise is added to its latents.
    history: Tensor | None = None
    #: What the last step of lcm estimated the picture to be and then added fresh noise to, [B, C, h, w].
    estimate: Tensor | None = None

    @property
    def scores(self) -> Tensor:
        """[steps, B, N]."""
        return torch.stack([verdict.score for verdict in self.verdicts])

    @property
    def fired(self) -> Tensor:
        """[steps, B, N] bool."""
        return torch.stack([verdict.fired for verdict in self.verdicts])

    @property
    def token_masks(self) -> Tensor:
        """Of the last step, [B, N, T]."""
        return self.verdicts[-1].token_mask


class Guard:
    """What `protect` hands out; `last` is the latest generation of the current thread or task."""

    def __init__(self) -> None:
        self._current: ContextVar[Generation | None] = ContextVar("generation", default=None)

    @property
    def last(self) -> Generation:
        generation = self._current.get()
        if generation is None:
            raise SafetyError("nothing was generated yet under this guard")
        return generation


@contextmanager
def protect(pipeline: StableDiffusionPipeline, safety: SafetyModule, policy: EagerPolicy | None = None) -> Iterator[Guard]:
    """Detects and redirects before every UNet call of `pipeline` while the context lasts; then leaves it as it was.

    Under samplers that add fresh noise in a step nothing is known of the picture to be expected, and what nobody asked for in
    words is seen later; except lcm, which states it, with models that predict noise.

    Words in letters that look like plain ones are read as plain words. Works with any batch size, `num_images_per_prompt`,
    `prompt_embeds`, negative prompts, guidance on and off. State belongs to one call of the pipeline and one thread.

    Raises:
        SafetyMismatchError: channels, tokens, width, prediction type, noise schedule or text encoder differ from the module's.
        SafetyError: an unknown concept in the policy; during generation, a UNet call without a prompt.
        NonFiniteError: during generation, NaN or infinity anywhere.
    """
    check_match(pipeline, safety)
    controller = Controller(safety).to(pipeline.unet.device).eval()
    operator = policy or EagerPolicy()
    operator.resolve(safety, 1, pipeline.unet.device)
    guard = Guard()
    encode_prompt = pipeline.encode_prompt

    def encode_and_begin(prompt: Any, *args: Any, **kwargs: Any) -> Any:
        embeds, negative = encode_prompt(_in_plain_letters(prompt), *args, **kwargs)
        resolved = operator.resolve(safety, len(embeds), embeds.device)
        state = State.initial(embeds, len(safety.config.concepts))
        guard._current.set(Generation(embeds, pipeline.do_classifier_free_guidance, state, resolved))
        return embeds, negative

    def before_unet(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        generation = guard._current.get()
        if generation is None:
            raise SafetyError("the UNet was called without a prompt having been encoded under protection")
        latent, embeds = args[0], kwargs["encoder_hidden_states"]
        requests = len(generation.original)
        if len(embeds) != requests * (2 if generation.guided else 1):
            raise SafetyError(f"the UNet got {len(embeds)} embeddings for {requests} requests; protection cannot follow")
        redirected = _step(controller, generation, latent[-requests:], args[1])
        kept = embeds[:-requests]
        return args, kwargs | {"encoder_hidden_states": torch.cat([kept, redirected]) if len(kept) else redirected}

    def after_unet(_: Any, __: Any, output: Any) -> None:
        prediction = output[0] if isinstance(output, tuple) else output.sample
        if not bool(torch.isfinite(prediction).all()):
            raise NonFiniteError("the UNet's prediction is not finite; no picture is drawn")
        generation = guard._current.get()
        if generation is not None and is_deterministic(pipeline.scheduler):
            generation.history = _guided(prediction, pipeline.guidance_scale) if generation.guided else prediction

    step = pipeline.scheduler.step

    def step_and_remember(*args: Any, **kwargs: Any) -> Any:
        output = step(*args, **kwargs)
        if (generation := guard._current.get()) is not None:
            generation.estimate = output[1] if isinstance(output, tuple) else output.denoised
        return output

    states_estimate = type(pipeline.scheduler).__name__ == "LCMScheduler" and safety.config.prediction_type == "epsilon"
    hooks = [
        pipeline.unet.register_forward_pre_hook(before_unet, with_kwargs=True),
        pipeline.unet.register_forward_hook(after_unet),
    ]
    pipeline.encode_prompt = encode_and_begin
    if states_estimate:
        pipeline.scheduler.step = step_and_remember
    try:
        yield guard
    finally:
        del pipeline.encode_prompt
        if states_estimate:
            del pipeline.scheduler.step
        for hook in hooks:
            hook.remove()


def check_match(pipeline: StableDiffusionPipeline, safety: SafetyModule) -> None:
    """Raise `SafetyMismatchError` unless `safety` was made for the text encoder and the shapes of `pipeline`."""
    config = safety.config
    facts = {
        "latent channels": (config.latent_channels, pipeline.unet.config.in_channels),
        "prompt tokens": (config.prompt_tokens, pipeline.tokenizer.model_max_length),
        "prompt width": (config.prompt_width, pipeline.unet.config.cross_attention_dim),
        "prediction type": (config.prediction_type, getattr(pipeline.scheduler.config, "prediction_type", "none")),
        "text encoder": (config.text_encoder_sha256, parameters_sha256(pipeline.text_encoder)),
    }
    for fact, (expected, found) in facts.items():
        if expected != found:
            raise SafetyMismatchError(f"{fact}: the safety module is made for {expected}, the pipeline has {found}")
    if config.alone:
        shares = getattr(pipeline.scheduler, "alphas_cumprod", torch.ones(0)).to(safety.alphas)
        off = float((shares - safety.alphas).abs().max()) if shares.shape == safety.alphas.shape else 1.0
        if off > SCHEDULE_TOLERANCE:
            raise SafetyMismatchError(f"noise schedule: signal shares differ by up to {off:.2g} from the safety module's")


def _in_plain_letters(prompt: str | list[str] | None) -> str | list[str] | None:
    """As a pipeline takes prompts; None where embeddings are given."""
    if isinstance(prompt, list):
        return [in_plain_letters(text) for text in prompt]
    return None if prompt is None else in_plain_letters(prompt)


def is_deterministic(scheduler: Any) -> bool:
    """Whether its next latent comes of the prediction alone."""
    stochastic = str(scheduler.config.get("algorithm_type", "")).startswith("sde-")
    return type(scheduler).__name__ in DETERMINISTIC and not stochastic


def _guided(both: Tensor, scale: float) -> Tensor:
    """Predictions without and with the prompt [2 B, C, h, w] -> [B, C, h, w]."""
    without, conditional = both.chunk(2)
    return without + scale * (conditional - without)


@torch.no_grad()
def _step(controller: Controller, generation: Generation, latent: Tensor, timestep: Tensor | float) -> Tensor:
    """Run the controller, keep the record, return the embedding in force [B, T, D]."""
    time = torch.as_tensor(timestep, dtype=torch.float32, device=latent.device).expand(len(latent))
    dtype = generation.original.dtype
    if generation.estimate is not None and controller.module.config.alone:
        generation.history = noise_beside(generation.estimate, latent, time, controller.module.alphas)
    state, verdict = controller(
        latent, time, generation.original, generation.state, generation.policy, history=generation.history
    )
    if not bool(state.ok.all()):
        raise NonFiniteError(f"latent, score or embedding is not finite at timestep {float(time[0]):g}; no picture is drawn")
    generation.state = state
    generation.timesteps.append(float(time[0]))
    generation.verdicts.append(verdict)
    generation.cooldowns.append(state.cooldown)
    prompt: Tensor = state.prompt.to(dtype)
    return prompt
