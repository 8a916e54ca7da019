"""`Pipeline`: prompts in, protected pictures and their safety records out."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from saferedir.engines import DEFAULT_BUNDLE, Bundle, open_bundle
from saferedir.engines.errors import BackendError, BundleError, NonFiniteError, SafeRedirError
from saferedir.engines.manifest import MANIFEST_FILE, TOKENIZER_FILE, ModelInfo
from saferedir.engines.plain_letters import in_plain_letters
from saferedir.runtime.backend import Backend
from saferedir.runtime.backends import make_backend
from saferedir.runtime.loop import Batch, Denoised, StepCallback, denoise
from saferedir.runtime.noise import TorchNoise
from saferedir.runtime.policy import ResolvedPolicy, SafetyPolicy, Tightening, resolve
from saferedir.runtime.record import SafetyRecord, StepRecord
from saferedir.runtime.request import ImageRequest, Seeds, build_requests, check_guidance, latent_size
from saferedir.runtime.schedulers import Schedule, make_schedule
from saferedir.runtime.tokenizer import PromptTokenizer, Tokenised, check_prompt


@dataclass(frozen=True)
class Generation:
    """The pictures of one call, and the safety record of each."""

    images: list[Image.Image]
    records: list[SafetyRecord]


class Pipeline:
    """Draws with one bundle on one backend. Safe for several threads: all state belongs to the call."""

    #: Shapes and constants of the model.
    model: ModelInfo

    def __init__(self, bundle: Bundle, backend: Backend, policy: SafetyPolicy | None = None) -> None:
        self.bundle = bundle
        self.backend = backend
        self.manifest = bundle.manifest
        if self.manifest.model is None or self.manifest.scheduler is None:
            raise BundleError(f"{bundle.folder} holds a safety alone and cannot draw; name a model when making it")
        self.model = self.manifest.model
        self._scheduler = self.manifest.scheduler
        self._policy = resolve(policy or SafetyPolicy(), self.manifest.safety)
        self._tokenizer = PromptTokenizer(
            bundle.read(TOKENIZER_FILE), self.model.prompt_tokens, self.model.added_words, str(bundle.folder / TOKENIZER_FILE)
        )

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
        scheduler: str | None = None,
        tighten: Tightening | None = None,
        on_step: StepCallback | None = None,
        cancel: threading.Event | None = None,
    ) -> Generation:
        """Draw one picture a prompt (times `num_images_per_prompt`).

        `height` and `width` are pixels, of a size that the bundle has engines for; the model's own by default.
        `prompt_embeds` [pictures, T, D] may stand in place of the prompts and is protected alike. Under safety, words in
        letters that look like plain ones are read as plain words (`in_plain_letters`). An integer `seed` is
        the first picture's and counts up; the noise is that of torch's CPU generator. Guidance of at most 1 draws
        unguided. `scheduler` is another sampler than the bundle's: ddim, euler, dpm-solver or lcm. `on_step(done, total)`
        counts over all pictures' steps; setting `cancel` ends the run between steps.

        Raises:
            RequestError: an option is out of range; the message names it.
            SafetyError: the safety failed; no picture of this call leaves.
            CancelledError: `cancel` was set.
        """
        guidance = check_guidance(guidance_scale)
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
        policy = self._policy.tightened(tighten)
        most = self.manifest.max_batch
        chunks = [requests[start : start + most] for start in range(0, len(requests), most)]
        images: list[Image.Image] = []
        records: list[SafetyRecord] = []
        for index, chunk in enumerate(chunks):
            batch, tokenised = self._prepare(chunk, size, guidance, policy, schedule)
            progress = _offset(on_step, index, len(chunks))
            result = denoise(
                self.backend,
                self.manifest,
                schedule,
                batch,
                protected=not policy.unprotected,
                on_step=progress,
                cancel=cancel,
            )
            images += self._decode(result.latent)
            records += self._records(chunk, tokenised, policy, schedule.timesteps, result)
        return Generation(images, records)

    @property
    def policy(self) -> ResolvedPolicy:
        """The operator's policy in force, before any request tightens it."""
        return self._policy

    def encode(self, prompts: Sequence[str]) -> npt.NDArray[np.float32]:
        """Prompt embeddings [B, T, D] of the bundle's text encoder."""
        return self._encode(np.stack([self._tokenizer(prompt).ids for prompt in prompts]))

    def _prepare(
        self, chunk: list[ImageRequest], size: tuple[int, int], guidance: float, policy: ResolvedPolicy, schedule: Schedule
    ) -> tuple[Batch, list[Tokenised | None]]:
        shape = (1, self.model.latent_channels, *size)
        read = [None if request.prompt is None else _read(request.prompt, policy) for request in chunk]
        tokenised = [None if text is None else self._tokenizer(text) for text in read]
        texts = {request.negative_prompt or "" for request in chunk}
        texts |= {text for text in read if text is not None}
        ordered = sorted(texts)
        embeds = dict(zip(ordered, self.encode(ordered), strict=True))
        prompt = [r.prompt_embeds if text is None else embeds[text] for r, text in zip(chunk, read, strict=True)]
        negative = [
            embeds[r.negative_prompt or ""] if r.negative_prompt_embeds is None else r.negative_prompt_embeds for r in chunk
        ]
        streams = [TorchNoise(request.seed) for request in chunk]
        latent = np.concatenate([stream.draw(shape) for stream in streams]) * np.float32(schedule.init_noise_sigma)
        batch = Batch(
            latent=latent,
            prompt=np.stack([p for p in prompt if p is not None]),
            negative=np.stack(negative),
            guidance_scale=guidance,
            noise=_step_noise(schedule, streams, shape),
            policies=(policy,) * len(chunk),
        )
        return batch, tokenised

    def _encode(self, ids: npt.NDArray[np.int32]) -> npt.NDArray[np.float32]:
        model = self.model
        parts = []
        for start in range(0, len(ids), self.manifest.max_batch):
            chunk = ids[start : start + self.manifest.max_batch]
            shape = (len(chunk), model.prompt_tokens, model.prompt_width)
            parts.append(self._run("text_encoder", {"input_ids": chunk}, "prompt_embeds", shape))
        return np.concatenate(parts)

    def _decode(self, latent: npt.NDArray[np.float32]) -> list[Image.Image]:
        scale = self.model.vae_scale_factor
        height, width = latent.shape[2:]
        shape = (len(latent), 3, height * scale, width * scale)
        pictures = self._run(self.model.engine("vae_decoder", height, width), {"latent": latent}, "image", shape)
        if not np.isfinite(pictures).all():
            raise NonFiniteError("the decoded picture is not finite; no picture leaves")
        pixels = (pictures.transpose(0, 2, 3, 1) * 255).round().astype(np.uint8)
        return [Image.fromarray(picture) for picture in pixels]

    def _run(self, engine: str, inputs: dict[str, Any], output: str, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
        tensors = {name: self.backend.upload(array) for name, array in inputs.items()}
        result = self.backend.empty(shape, np.dtype(np.float32))
        try:
            self.backend.bind(engine, tensors, {output: result})()
        except SafeRedirError:
            raise
        except Exception as error:  # a backend raises types of its own
            raise BackendError(f"engine {engine} raised: {error}") from error
        return self.backend.download(result)

    def _records(
        self,
        chunk: list[ImageRequest],
        tokenised: list[Tokenised | None],
        policy: ResolvedPolicy,
        timesteps: npt.NDArray[np.float32],
        result: Denoised,
    ) -> list[SafetyRecord]:
        versions = self.versions()
        records = []
        for row, (request, tokens) in enumerate(zip(chunk, tokenised, strict=True)):
            steps = tuple(
                StepRecord(
                    timestep=float(timesteps[step]),
                    score={name: float(result.score[step, row, n]) for n, name in enumerate(policy.concepts)},
                    fired=tuple(name for n, name in enumerate(policy.concepts) if result.fired[step, row, n]),
                    cooldown=int(result.cooldown[step, row]),
                )
                for step in range(len(result.score))
            )
            fired = {name for step in steps for name in step.fired}
            records.append(
                SafetyRecord(
                    prompt=request.prompt,
                    seed=request.seed,
                    protected=not policy.unprotected,
                    tokens_cut=tokens.cut if tokens else 0,
                    steps=steps,
                    tokens=tokens.tokens if tokens else (),
                    token_mask={
                        name: tuple(float(value) for value in result.token_mask[row, n])
                        for n, name in enumerate(policy.concepts)
                        if name in fired
                    },
                    versions=versions,
                )
            )
        return records

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


def _read(prompt: str, policy: ResolvedPolicy) -> str:
    prompt = check_prompt(prompt)
    return prompt if policy.unprotected else in_plain_letters(prompt)


def _step_noise(schedule: Schedule, streams: list[TorchNoise], shape: tuple[int, ...]) -> npt.NDArray[np.float32] | None:
    """Noise for the steps that add some, of each picture's own stream: [steps, B, C, h, w]."""
    adds = schedule.coefficients[:, 3] != 0
    if not adds.any():
        return None
    nothing = np.zeros(shape, np.float32)
    return np.stack([np.concatenate([stream.draw(shape) if add else nothing for stream in streams]) for add in adds])


def _offset(on_step: StepCallback | None, index: int, chunks: int) -> StepCallback | None:
    if on_step is None:
        return None
    return lambda done, total: on_step(index * total + done, chunks * total)
