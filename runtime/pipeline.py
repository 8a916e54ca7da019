"""`Pipeline`: prompts in, protected pictures and their safety records out."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from saferedir.engines import DEFAULT_BUNDLE, Bundle, open_bundle
from saferedir.engines.errors import BackendError, BundleError, CancelledError, NonFiniteError, SafeRedirError
from saferedir.engines.manifest import MANIFEST_FILE, TOKENIZER_FILE, ModelInfo
from saferedir.runtime.backend import Backend
from saferedir.runtime.backends import make_backend
from saferedir.runtime.batcher import Batcher
from saferedir.runtime.gathering import Gathering
from saferedir.runtime.job import Denoised, Drawing
from saferedir.runtime.policy import ResolvedPolicy, SafetyPolicy, Tightening, check_promise, resolve
from saferedir.runtime.prompts import Prompts
from saferedir.runtime.record import LookedFor, SafetyRecord, StepRecord
from saferedir.runtime.request import ImageRequest, Seeds, build_requests, check_guidance, check_rescale, latent_size
from saferedir.runtime.schedulers import Schedule, make_schedule
from saferedir.runtime.ticket import StepCallback, Ticket
from saferedir.runtime.tokenizer import PromptTokenizer, check_prompt

log = logging.getLogger("saferedir")

#: How long a call that waits takes to notice that it is cancelled.
CANCEL_SECONDS = 0.05
#: A picture that has ended, or None for each step that was done.
Events = SimpleQueue[Ticket | None]


@dataclass(frozen=True)
class Plan:
    """What one call is to draw, checked: its pictures, and what they have in common."""

    requests: list[ImageRequest]
    prompts: Prompts
    policy: ResolvedPolicy
    #: The step graph.
    engine: str
    schedule: Schedule
    #: The sampler's name.
    scheduler: str
    guidance_scale: float
    guidance_rescale: float
    #: Height and width of the latents.
    size: tuple[int, int]
    #: Whether the safety's promise is for these settings; None where there is none.
    within_promise: bool | None


@dataclass(frozen=True)
class Generation:
    """The pictures of one call, and the safety record of each."""

    images: list[Image.Image]
    records: list[SafetyRecord]


class Pipeline:
    """Draws with one bundle on one backend. Safe for several threads: all state belongs to the call."""

    #: Shapes and constants of the model.
    model: ModelInfo

    def __init__(
        self,
        bundle: Bundle,
        backend: Backend,
        policy: SafetyPolicy | None = None,
        *,
        rows: int | None = None,
        queue: int | None = None,
    ) -> None:
        """`rows` pictures are drawn at once at most, by default what the engines are made for; of others `queue` may wait, any
        number where it is None."""
        self.bundle = bundle
        self.backend = backend
        self.manifest = bundle.manifest
        if self.manifest.model is None or self.manifest.scheduler is None:
            raise BundleError(f"{bundle.folder} holds a safety alone and cannot draw; name a model when making it")
        self.model = self.manifest.model
        self._scheduler = self.manifest.scheduler
        self._policy = resolve(policy or SafetyPolicy(), self.manifest.safety)
        #: Draws the pictures of all calls.
        self.batcher = Batcher(backend, self.manifest, capacity=rows, queue=queue)
        self._encode = Gathering(self._text_encoder, self.manifest.max_batch)
        self._decode = Gathering(self._vae_decoder, self.manifest.max_batch)
        source = str(bundle.folder / TOKENIZER_FILE)
        self._tokenizer = PromptTokenizer(bundle.read(TOKENIZER_FILE), self.model.prompt_tokens, source)

    @classmethod
    def from_bundle(
        cls,
        path_or_name: str | Path = DEFAULT_BUNDLE,
        *,
        backend: str = "auto",
        policy: SafetyPolicy | None = None,
        threads: int | None = None,
        digest: str | None = None,
    ) -> Pipeline:
        """Open a bundle (a folder, or the name of an embedded one) on a backend (`auto`, or a name of `doctor`'s list).

        `digest` pins the bundle: the SHA-256 of its manifest, by default that in `SAFEREDIR_BUNDLE_DIGEST`.

        Raises:
            BundleError, SafetyError: the bundle is not whole, or its safety does not fit.
            BackendError: the backend is unknown, or cannot be had here.
            RequestError: the policy names an unknown concept or an impossible value.
        """
        bundle = open_bundle(path_or_name, digest=digest)
        return cls(bundle, make_backend(bundle, backend, threads=threads), policy)

    def __call__(
        self,
        prompts: str | Sequence[str] | None = None,
        *,
        prompt_embeds: npt.ArrayLike | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        negative_prompt_embeds: npt.ArrayLike | None = None,
        height: int | None = None,
        width: int | None = None,
        seed: Seeds = 0,
        num_images_per_prompt: int = 1,
        num_inference_steps: int = 25,
        guidance_scale: float = 5.0,
        guidance_rescale: float = 0.0,
        scheduler: str | None = None,
        tighten: Tightening | None = None,
        on_step: StepCallback | None = None,
        cancel: threading.Event | None = None,
    ) -> Generation:
        """Draw one picture a prompt (times `num_images_per_prompt`), 1,000 a call at most.

        `height` and `width` are pixels, of a size that the bundle has engines for; the model's own by default.
        `prompt_embeds` [pictures, T, D] may stand in place of the prompts and is protected alike. Under safety, words in
        letters that look like plain ones are read as plain words (`in_plain_letters`). An integer `seed` is
        the first picture's and counts up, None a random one; the noise is that of torch's CPU generator, which heeds a seed's
        low 32 bits. Guidance of at most 1 draws unguided, so that a negative prompt is ignored, as in diffusers; that is
        logged. `guidance_rescale`, 0 to 1, takes what guidance draws to the contrast of its conditional half (Lin et al. 2023).
        `scheduler` is another sampler than the bundle's, a name of `SCHEDULERS`. `on_step(done, total)` counts over all
        pictures' steps; setting `cancel` ends the run between steps. Records state all of this.

        Raises:
            RequestError: an option is out of range, or the safety's promise is not for it; the message names it.
            SafetyError: the safety failed; no picture of this call leaves.
            CancelledError: `cancel` was set.
        """
        plan = self.plan(
            prompts, prompt_embeds=prompt_embeds, negative_prompt=negative_prompt,
            negative_prompt_embeds=negative_prompt_embeds, height=height, width=width, seed=seed,
            num_images_per_prompt=num_images_per_prompt, num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale, guidance_rescale=guidance_rescale, scheduler=scheduler, tighten=tighten,
        )  # fmt: skip
        return self.finish(plan, self.draw(plan, on_step, cancel))

    def plan(
        self,
        prompts: str | Sequence[str] | None = None,
        *,
        prompt_embeds: npt.ArrayLike | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        negative_prompt_embeds: npt.ArrayLike | None = None,
        height: int | None = None,
        width: int | None = None,
        seed: Seeds = 0,
        num_images_per_prompt: int = 1,
        num_inference_steps: int = 25,
        guidance_scale: float = 5.0,
        guidance_rescale: float = 0.0,
        scheduler: str | None = None,
        tighten: Tightening | None = None,
        policy: ResolvedPolicy | None = None,
    ) -> Plan:
        """What a call with these arguments is to draw, under `policy` of an operator or the pipeline's own. Computes nothing.

        Raises:
            RequestError: as a call does.
        """
        guidance = check_guidance(guidance_scale)
        rescale = check_rescale(self.model, guidance_rescale, guidance)
        size = latent_size(self.model, height, width)
        requests = build_requests(
            self.model,
            prompts,
            prompt_embeds=prompt_embeds,
            negative_prompt=negative_prompt,
            negative_prompt_embeds=negative_prompt_embeds,
            seed=seed,
            num_images_per_prompt=num_images_per_prompt,
        )
        schedule = make_schedule(self._scheduler, self.model.prediction_type, num_inference_steps, scheduler)
        policy = (policy or self._policy).tightened(tighten)
        if guidance <= 1 and any(request.has_negative for request in requests):
            log.warning("the negative prompt is ignored: guidance_scale is %g, and at most 1 draws unguided", guidance)
        read = Prompts(requests, self._tokenizer, self._encode, plain_letters=not policy.unprotected)
        within = self._within_promise(policy, num_inference_steps, guidance, scheduler)
        name = ("plain_step" if policy.unprotected else "step") + ("" if guidance > 1 else "_unguided")
        engine, kind = self.model.engine(name, *size), scheduler or self._scheduler.kind
        return Plan(requests, read, policy, engine, schedule, kind, guidance, rescale, size, within)

    def drawings(self, plan: Plan, requests: Sequence[ImageRequest]) -> list[Drawing]:
        """Those of the plan's pictures, their prompts encoded, for the batcher."""
        return [
            Drawing(
                engine=plan.engine,
                schedule=plan.schedule,
                prompt=prompt,
                negative=negative,
                guidance_scale=plan.guidance_scale,
                guidance_rescale=plan.guidance_rescale,
                policy=plan.policy,
                seed=request.seed,
                size=(self.model.latent_channels, *plan.size),
            )
            for request, prompt, negative in zip(requests, *plan.prompts.embeddings(requests), strict=True)
        ]

    def finish(self, plan: Plan, done: Sequence[Denoised]) -> Generation:
        """The pictures of a plan and their records."""
        images = self.decode(np.stack([result.latent for result in done]))
        records = [self._record(request, plan, result) for request, result in zip(plan.requests, done, strict=True)]
        return Generation(images, records)

    def check(self, *, num_inference_steps: int, guidance_scale: float, scheduler: str | None = None) -> None:
        """Raise `RequestError` where no request could be drawn with these."""
        guidance = check_guidance(guidance_scale)
        make_schedule(self._scheduler, self.model.prediction_type, num_inference_steps, scheduler)
        self._within_promise(self._policy, num_inference_steps, guidance, scheduler)

    def _within_promise(self, policy: ResolvedPolicy, steps: int, guidance: float, scheduler: str | None) -> bool | None:
        sampler, promise = scheduler or self._scheduler.kind, self.manifest.safety.promise
        return check_promise(policy, promise, steps=steps, sampler=sampler, guidance_scale=guidance)

    @property
    def policy(self) -> ResolvedPolicy:
        """The operator's policy in force, before any request tightens it."""
        return self._policy

    def encode(self, prompts: Sequence[str]) -> npt.NDArray[np.float32]:
        """Prompt embeddings [B, T, D] of the bundle's text encoder.

        Raises:
            RequestError: a prompt is no text, or too long.
        """
        return self._encode(np.stack([self._tokenizer(check_prompt(prompt)).ids for prompt in prompts]))

    def draw(self, plan: Plan, on_step: StepCallback | None = None, cancel: threading.Event | None = None) -> list[Denoised]:
        """All of them, or none. So many are handed to the batcher that none of its rows stands empty."""
        most, happened, tickets = self.batcher.capacity, Events(), list[Ticket]()
        steps, done, ended = len(plan.schedule.timesteps) * len(plan.requests), 0, 0
        try:
            while ended < len(plan.requests):
                if len(tickets) < len(plan.requests) and len(tickets) - ended <= most:
                    chunk = plan.requests[len(tickets) : len(tickets) + most]
                    added = self.batcher.reserve(plan.engine, len(plan.schedule.timesteps), len(chunk))
                    tickets += added
                    for ticket in added:
                        ticket.on_step = lambda done, total: happened.put(None)
                        ticket.future.add_done_callback(lambda future, ticket=ticket: happened.put(ticket))  # type: ignore[misc]
                    self.batcher.submit(added, self.drawings(plan, chunk))
                event = _next(happened, cancel, f"cancelled after {done} of {steps} steps")
                if event is not None:
                    event.future.result()  # raises where it failed
                    event.job, ended = None, ended + 1
                    continue
                done += 1
                if on_step is not None:
                    on_step(done, steps)
        finally:
            for ticket in tickets:
                ticket.cancel()
            for ticket in tickets:
                if ticket.submitted:
                    ticket.future.exception()  # waits: nothing of a call goes on when it has ended
        return [ticket.future.result() for ticket in tickets]

    def decode(self, latent: npt.NDArray[np.float32]) -> list[Image.Image]:
        """Pictures of clean latents [B, C, h, w].

        Raises:
            NonFiniteError: one is not finite.
        """
        pictures = self._decode(latent)
        if not np.isfinite(pictures).all():
            raise NonFiniteError("the decoded picture is not finite; no picture leaves")
        pixels = (pictures.transpose(0, 2, 3, 1) * 255).round().astype(np.uint8)
        return [Image.fromarray(picture) for picture in pixels]

    def _text_encoder(self, ids: npt.NDArray[np.int32]) -> npt.NDArray[np.float32]:
        shape = (len(ids), self.model.prompt_tokens, self.model.prompt_width)
        return self._run("text_encoder", {"input_ids": ids}, "prompt_embeds", shape)

    def _vae_decoder(self, latent: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        scale, (height, width) = self.model.vae_scale_factor, latent.shape[2:]
        shape = (len(latent), 3, height * scale, width * scale)
        return self._run(self.model.engine("vae_decoder", height, width), {"latent": latent}, "image", shape)

    def _run(self, engine: str, inputs: dict[str, Any], output: str, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
        tensors = {name: self.backend.upload(array) for name, array in inputs.items()}
        result = self.backend.empty(shape, np.dtype(np.float32))
        try:
            self.backend.bind(engine, tensors, {output: result})()
        except SafeRedirError:
            raise
        except Exception as error:  # a backend raises types of its own
            raise BackendError(f"engine {engine} raised: {error}") from error
        return self.backend.read(result)

    def _record(self, request: ImageRequest, plan: Plan, result: Denoised) -> SafetyRecord:
        policy, timesteps = plan.policy, plan.schedule.timesteps
        tokens, scale = plan.prompts.tokens(request), self.model.vae_scale_factor
        steps = tuple(
            StepRecord(
                timestep=float(timesteps[step]),
                score={name: float(result.score[step, n]) for n, name in enumerate(policy.concepts)},
                fired=tuple(name for n, name in enumerate(policy.concepts) if result.fired[step, n]),
                cooldown=int(result.cooldown[step]),
            )
            for step in range(len(result.score))
        )
        fired = {name for step in steps for name in step.fired}
        return SafetyRecord(
            prompt=request.prompt,
            negative_prompt=_negative(request, plan.guidance_scale),
            seed=request.seed,
            scheduler=plan.scheduler,
            num_inference_steps=len(timesteps),
            guidance_scale=plan.guidance_scale,
            guidance_rescale=plan.guidance_rescale,
            height=plan.size[0] * scale,
            width=plan.size[1] * scale,
            protected=policy.looks,
            within_promise=plan.within_promise,
            looked_for=_looked_for(policy),
            cooldown=policy.cooldown if policy.looks else None,
            tokens_cut=tokens.cut if tokens else 0,
            steps=steps,
            tokens=tokens.tokens if tokens else (),
            token_mask={
                name: tuple(float(value) for value in result.token_mask[n])
                for n, name in enumerate(policy.concepts)
                if name in fired
            },
            versions=self.versions(),
        )

    def versions(self) -> dict[str, str]:
        """Bundle, SHA-256 of its manifest and of each of its files, runtime and backend."""
        hashes = {f"{name} sha256": file.sha256 for name, file in self.manifest.files.items()}
        return {
            "bundle": self.manifest.name,
            f"{MANIFEST_FILE} sha256": self.bundle.digest,
            "saferedir": version("saferedir"),
            **self.backend.versions(),
            **hashes,
        }


def _next(happened: Events, cancel: threading.Event | None, message: str) -> Ticket | None:
    """What happened next.

    Raises:
        CancelledError: `cancel` is set.
    """
    while cancel is None or not cancel.is_set():
        try:
            return happened.get(timeout=None if cancel is None else CANCEL_SECONDS)
        except Empty:
            continue
    raise CancelledError(message)


def _negative(request: ImageRequest, guidance_scale: float) -> Literal["none", "given", "ignored"]:
    if not request.has_negative:
        return "none"
    return "given" if guidance_scale > 1 else "ignored"


def _looked_for(policy: ResolvedPolicy) -> dict[str, LookedFor]:
    """What the policy looks for, and how."""
    return {
        name: LookedFor(None if name in policy.by_argmax else float(policy.threshold[n]), float(policy.alpha_scale[n]) or None)
        for n, name in enumerate(policy.concepts)
        if policy.looks and policy.enabled[n]
    }
