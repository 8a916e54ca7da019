"""What the safety does in one call of a pipeline: it decides in every step, and keeps the record."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from saferedir.engines.errors import NonFiniteError, RequestError, SafetyError
from saferedir_torch.config import SafetyConfig
from saferedir_torch.controller import Controller, Guided, Seen, State, Verdict, amplification
from saferedir_torch.eager_policy import Choices
from saferedir_torch.estimate import NoiseLevels
from saferedir_torch.safety_module import SafetyModule


class Guidance(NamedTuple):
    """How a pipeline puts together what is predicted without and with the prompt."""

    scale: float
    #: How far the result's deviation is brought back to that of the prediction with the prompt (arXiv 2305.08891, section 3.4).
    rescale: float = 0.0

    def of(self, prediction: Tensor) -> Tensor:
        """Of both [2 B, C, h, w] -> [B, C, h, w]."""
        without, conditional = prediction.chunk(2)
        guided = without + self.scale * (conditional - without)
        if not self.rescale:
            return guided
        spread = conditional.flatten(1).std(dim=1) / guided.flatten(1).std(dim=1)
        return guided * (self.rescale * spread + 1 - self.rescale)[:, None, None, None]


@dataclass
class CallRecord:
    """What was looked for in one call of a pipeline, what was seen in every step, and what was done."""

    #: Concepts of the module, in the order of N.
    concepts: tuple[str, ...]
    #: The policy in force: concepts looked for, thresholds, strengths, steps of rest.
    policy: Choices
    #: B, pictures that were drawn.
    pictures: int
    #: One number a step.
    timesteps: list[float] = field(default_factory=list)
    #: One `Verdict` a step, each for the whole batch.
    verdicts: list[Verdict] = field(default_factory=list)
    #: Steps of rest left after each step, [B] each.
    cooldowns: list[Tensor] = field(default_factory=list)

    @property
    def scores(self) -> Tensor:
        """[steps, B, N]."""
        seen = [verdict.score for verdict in self.verdicts]
        return torch.stack(seen) if seen else torch.zeros(0, self.pictures, len(self.concepts))

    @property
    def fired(self) -> Tensor:
        """[steps, B, N] bool."""
        seen = [verdict.fired for verdict in self.verdicts]
        return torch.stack(seen) if seen else torch.zeros(0, self.pictures, len(self.concepts), dtype=torch.bool)

    @property
    def token_masks(self) -> Tensor:
        """Of the last step, [B, N, T]."""
        return self.verdicts[-1].token_mask


class SafetyRun:
    """The state of the B requests of one call."""

    def __init__(
        self, config: SafetyConfig, module_on: Callable[[torch.device], SafetyModule], choices: Choices, requests: int
    ) -> None:
        """`module_on` gives the safety module of this configuration on the device that the call turns out to run on."""
        self.config, self.requests = config, requests
        self.record = CallRecord(tuple(config.concept_names), choices, requests)
        self._module_on = module_on
        self._given: Tensor | None = None  # embeddings that the call began with, [B, T, D]
        self._step: tuple[Tensor, float] | None = None  # latent and timestep that were decided and not yet denoised
        self._denoised: Tensor | None = None  # the estimate that the step before made, [B, C, h, w]

    @property
    def steps(self) -> int:
        """How many steps were decided so far."""
        return len(self.record.verdicts)

    def embeddings(
        self, sample: Tensor, timestep: Tensor | float, embeds: Tensor, levels: NoiseLevels, scale: float, *, denoises: bool
    ) -> Tensor:
        """`embeds` [B, T, D], or [2 B, T, D] with those of the negative prompt before them, as a network is to be given them.

        A step is decided once, when its first network is called with `sample` [B or 2 B, C, h, w] at `timestep`; the network
        that `denoises` ends it. `scale` is that of guidance.

        Raises:
            SafetyError: the embeddings are not those that the call began with.
            RequestError: they are of another shape than the module reads.
            NonFiniteError: NaN or infinity in latent, score or embedding.
        """
        if len(embeds) not in (self.requests, 2 * self.requests):
            raise SafetyError(
                f"a network got {len(embeds)} embeddings for {self.requests} pictures; expected {self.requests}, or twice as "
                "many with guidance"
            )
        if len(sample) != len(embeds):
            raise SafetyError(f"a network got {len(sample)} latents and {len(embeds)} embeddings; expected as many of each")
        conditional, latent = embeds[-self.requests :], sample[-self.requests :]
        time = float(torch.as_tensor(timestep).flatten()[-1])
        if self._given is None:
            self._begin(conditional)
        elif not torch.equal(conditional, self._given):
            raise SafetyError(
                "a network got other embeddings than its call began with: a callback changed the prompt, or a pipeline that is "
                "not protected was called within the call; neither can be followed"
            )
        if self._step is None or not (torch.equal(latent, self._step[0]) and time == self._step[1]):
            guided = len(embeds) > self.requests
            self._decide(latent.float(), time, levels.at(time).share, embeds[: self.requests].float(), scale if guided else 1.0)
        self._step = None if denoises else (latent, time)
        return torch.cat([embeds[: -self.requests], self._state.prompt.to(embeds)])

    def predicted(
        self, sample: Tensor, timestep: Tensor | float, prediction: Tensor, levels: NoiseLevels, guidance: Guidance
    ) -> None:
        """Take note of what the UNet predicts for `sample`, [B or 2 B, C, h, w] both, for the step that follows.

        Raises:
            NonFiniteError: the prediction holds NaN or infinity, or tells no picture.
        """
        if not bool(torch.isfinite(prediction).all()):
            raise NonFiniteError("the UNet's prediction is not finite; no picture is drawn")
        guided = guidance.of(prediction.float()) if len(prediction) > self.requests else prediction.float()
        time = float(torch.as_tensor(timestep).flatten()[-1])
        self._denoised = levels.denoised(sample[-self.requests :].float(), time, guided)
        if not bool(torch.isfinite(self._denoised).all()):
            raise NonFiniteError(
                f"at timestep {time:g} the UNet's prediction tells no picture, as of noise alone where noise is predicted; "
                "no picture is drawn"
            )

    def _begin(self, conditional: Tensor) -> None:
        check_embeddings(self.config, conditional, "the prompt's embeddings")
        self._controller = Controller(self._module_on(conditional.device))
        self._given = conditional.clone()
        self._original = self._given.float()
        self._state = State.initial(self._original, len(self.record.concepts))
        self._policy = self.record.policy.tensors(self.requests, conditional.device)

    @torch.no_grad()
    def _decide(self, latent: Tensor, time: float, share: float, negative: Tensor, scale: float) -> None:
        seen = seen_of(latent, share, self._denoised)
        guided = Guided(negative, torch.full((self.requests,), amplification(scale), device=latent.device))
        with torch.autocast(latent.device.type, enabled=False):  # a pipeline's autocast is not the safety's
            state, verdict = self._controller(seen, self._original, guided, self._state, self._policy)
        if not bool(state.ok.all()):
            raise NonFiniteError(f"latent, score or embedding is not finite at timestep {time:g}; no picture is drawn")
        self._state = state
        self.record.timesteps.append(time)
        self.record.verdicts.append(verdict)
        self.record.cooldowns.append(state.cooldown)


def seen_of(latent: Tensor, share: float, denoised: Tensor | None) -> Seen:
    """What B requests of one step see: latent [B, C, h, w] at a noise share, and the estimate of the step before, if any."""
    return Seen(
        latent,
        torch.full((len(latent),), share, device=latent.device),
        torch.zeros_like(latent) if denoised is None else denoised,
        torch.full((len(latent),), denoised is not None, device=latent.device),
    )


def check_embeddings(config: SafetyConfig, embeds: Tensor, name: str) -> None:
    """Raise `RequestError` unless `embeds` are [B, T, D] of the module's T and D."""
    expected = (config.streams[0].tokens, config.streams[0].width)
    if tuple(embeds.shape[1:]) != expected:
        raise RequestError(
            f"{name} are of shape {list(embeds.shape)}; expected {expected[0]} tokens of width {expected[1]}, as the safety "
            "module reads them"
        )
