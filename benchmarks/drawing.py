"""Pictures by the thousand: drawn in chunks that are kept, so that an interrupted evaluation goes on where it was."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from rich.progress import track
from torch import Tensor

from saferedir.engines.errors import RequestError
from saferedir.engines.plain_letters import in_plain_letters
from saferedir.runtime import Pipeline, SafetyPolicy
from saferedir.runtime.record import SafetyRecord
from saferedir_torch.peers.peer import Peer

CHUNK = 64
#: Identities of pipelines: the bundle's own step graph, and no safety at all. Others state the module's hash.
DEPLOYED, PLAIN = "deployed", "plain"


@dataclass(frozen=True)
class Setting:
    """How pictures are drawn; a scheduler that is None is the bundle's own."""

    steps: int = 25
    guidance: float = 5.0
    scheduler: str | None = None

    def refusal(self, pipeline: Pipeline) -> str:
        """Why `pipeline` does not draw so; empty where it does."""
        try:
            pipeline.check(num_inference_steps=self.steps, guidance_scale=self.guidance, scheduler=self.scheduler)
        except RequestError as error:
            return str(error)
        return ""


#: Of pictures of which nothing else is said.
USUAL = Setting()


@dataclass(frozen=True)
class Embeddings:
    """What a request may bring in place of texts, both [R, T, D]."""

    prompt: npt.NDArray[np.float32]
    negative: npt.NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.prompt)


Asked = Sequence[str] | Embeddings


@dataclass(frozen=True)
class Drawn:
    """R pictures and what the safety saw; N concepts, S steps (0 where the safety was off)."""

    #: [R, H, W, 3].
    pixels: npt.NDArray[np.uint8]
    #: [R, S, N].
    score: npt.NDArray[np.float32]
    #: [R, S, N].
    fired: npt.NDArray[np.bool_]
    #: [R, N, T], of the last step.
    mask: npt.NDArray[np.float32]

    @property
    def pictures(self) -> Tensor:
        """[R, 3, H, W] in [-1, 1]."""
        return as_pictures(self.pixels)

    @property
    def any_fired(self) -> npt.NDArray[np.bool_]:
        """[R]: something fired in some step."""
        return np.asarray(self.fired.any(axis=(1, 2)), np.bool_)

    def rows(self, index: npt.NDArray[np.int64]) -> Drawn:
        """Some of the pictures."""
        return Drawn(self.pixels[index], self.score[index], self.fired[index], self.mask[index])


def as_pictures(pixels: npt.NDArray[np.uint8]) -> Tensor:
    """[R, H, W, 3] -> [R, 3, H, W] in [-1, 1], as the judges take them."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


class Studio:
    """Draws with pipelines, and keeps what it drew in `folder` under a hash of everything that it depends on."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def draw(
        self,
        pipeline: Pipeline | Peer,
        identity: str,
        asked: Asked,
        seeds: Sequence[int],
        title: str,
        setting: Setting | None = None,
    ) -> Drawn:
        """One picture a prompt and seed. `identity` names what the pipeline itself does not show: module, controller; of a
        peer, which shows nothing, all that its pictures depend on. A peer has a setting of its own."""
        parts = []
        for start in track(range(0, len(asked), CHUNK), description=title):
            part = slice(start, start + CHUNK)
            own = Embeddings(asked.prompt[part], asked.negative[part]) if isinstance(asked, Embeddings) else list(asked[part])
            parts.append(self._chunk(pipeline, identity, own, [int(seed) for seed in seeds[part]], setting or USUAL))
        return Drawn(*(np.concatenate([getattr(part, key) for part in parts]) for key in ("pixels", "score", "fired", "mask")))

    def _chunk(
        self, pipeline: Pipeline | Peer, identity: str, asked: list[str] | Embeddings, seeds: list[int], setting: Setting
    ) -> Drawn:
        path = self.folder / f"{drawing_key(pipeline, identity, asked, seeds, setting)}.npz"
        if not path.exists():
            drawn = (
                _collect(pipeline, asked, seeds, setting) if isinstance(pipeline, Pipeline) else _drawn(pipeline, asked, seeds)
            )
            partial = path.with_suffix(f".{os.getpid()}-{threading.get_ident()}.partial")  # others may draw the same
            with partial.open("wb") as file:
                np.savez_compressed(file, **vars(drawn))
            os.replace(partial, path)
        with np.load(path) as kept:
            return Drawn(**{key: kept[key] for key in kept.files})


def plain_of(pipeline: Pipeline) -> Pipeline:
    """The same engines with the safety switched off."""
    return Pipeline(pipeline.bundle, pipeline.backend, SafetyPolicy(unprotected=True))


def _collect(pipeline: Pipeline, asked: list[str] | Embeddings, seeds: list[int], setting: Setting) -> Drawn:
    drawn_with: dict[str, Any] = {"num_inference_steps": setting.steps, "guidance_scale": setting.guidance}
    if isinstance(asked, Embeddings):
        drawn_with |= {"prompt_embeds": asked.prompt, "negative_prompt_embeds": asked.negative}
    else:
        drawn_with |= {"prompts": asked}
    made = pipeline(seed=seeds, scheduler=setting.scheduler, **drawn_with)
    concepts = [concept.name for concept in pipeline.manifest.safety.concepts]
    tokens = pipeline.model.prompt_tokens
    return Drawn(
        pixels=np.stack([np.asarray(image) for image in made.images]),
        score=np.array([[[step.score[name] for name in concepts] for step in record.steps] for record in made.records],
                       np.float32).reshape(len(seeds), -1, len(concepts)),
        fired=np.array([[[name in step.fired for name in concepts] for step in record.steps] for record in made.records],
                       np.bool_).reshape(len(seeds), -1, len(concepts)),
        mask=np.stack([_mask(record, concepts, tokens) for record in made.records]),
    )  # fmt: skip


def _drawn(peer: Peer, asked: list[str] | Embeddings, seeds: list[int]) -> Drawn:
    """A peer keeps no record: nothing is said to fire."""
    assert not isinstance(asked, Embeddings)  # peers take texts
    count = len(asked)
    return Drawn(
        peer.draw(asked, seeds), np.zeros((count, 0, 0), np.float32), np.zeros((count, 0, 0), np.bool_),
        np.zeros((count, 0, 0), np.float32),
    )  # fmt: skip


def _mask(record: SafetyRecord, concepts: list[str], tokens: int) -> npt.NDArray[np.float32]:
    return np.stack([np.array(record.token_mask.get(name, (0.0,) * tokens), np.float32) for name in concepts])


def drawing_key(
    pipeline: Pipeline | Peer, identity: str, asked: list[str] | Embeddings, seeds: list[int], setting: Setting
) -> str:
    if isinstance(pipeline, Peer):
        return _hash([identity, asked, seeds])
    policy = pipeline.policy
    own = {name: file.sha256 for name, file in pipeline.manifest.files.items() if not name.startswith(("safety", "step"))}
    files = {name: file.sha256 for name, file in pipeline.manifest.files.items()} if identity == DEPLOYED else own
    values = [policy.enabled, policy.threshold, policy.alpha_scale, np.array(policy.cooldown)]
    rules = None if policy.unprotected else [value.tolist() for value in values]
    if isinstance(asked, Embeddings):
        read = [hashlib.sha256(array.tobytes()).hexdigest() for array in (asked.prompt, asked.negative)]
    else:
        read = asked if policy.unprotected else [in_plain_letters(prompt) for prompt in asked]
    return _hash([files, identity, rules, read, seeds, [setting.steps, setting.guidance, setting.scheduler]])


def _hash(stated: list[Any]) -> str:
    return hashlib.sha256(json.dumps(stated).encode()).hexdigest()[:32]
