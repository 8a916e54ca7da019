"""Pictures by the thousand: drawn in chunks that are kept, so that an interrupted evaluation goes on where it was."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from rich.progress import track
from torch import Tensor

from saferedir.engines.plain_letters import in_plain_letters
from saferedir.runtime import Pipeline
from saferedir.runtime.record import SafetyRecord
from saferedir_torch.peers.peer import Peer

CHUNK = 64
#: What is drawn in place of prompts that only stand for it, and say all that it depends on: embeddings, guidance.
Options = Callable[[Sequence[str]], Mapping[str, Any]]
#: Identities of pipelines: the bundle's own step graph, and no safety at all. Others state the module's hash.
DEPLOYED, PLAIN = "deployed", "plain"


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
        self, pipeline: Pipeline | Peer, identity: str, prompts: Sequence[str], seeds: Sequence[int], title: str,
        options: Options | None = None,
    ) -> Drawn:  # fmt: skip
        """One picture a prompt and seed, of a `Pipeline` by what `options` gives for the prompts.

        `identity` names what the pipeline itself does not show: module, controller; of a peer, which shows nothing, all that
        its pictures depend on.
        """
        parts = []
        for start in track(range(0, len(prompts), CHUNK), description=title):
            part = slice(start, start + CHUNK)
            parts.append(self._chunk(pipeline, identity, list(prompts[part]), [int(seed) for seed in seeds[part]], options))
        return Drawn(*(np.concatenate([getattr(part, key) for part in parts]) for key in ("pixels", "score", "fired", "mask")))

    def _chunk(
        self, pipeline: Pipeline | Peer, identity: str, prompts: list[str], seeds: list[int], options: Options | None
    ) -> Drawn:
        path = self.folder / f"{_key(pipeline, identity, prompts, seeds)}.npz"
        if not path.exists():
            if isinstance(pipeline, Pipeline):
                drawn = _collect(pipeline, {"prompts": prompts} if options is None else options(prompts), seeds)
            else:
                drawn = _drawn(pipeline, prompts, seeds)
            partial = path.with_suffix(f".{os.getpid()}-{threading.get_ident()}.partial")  # others may draw the same
            with partial.open("wb") as file:
                np.savez_compressed(file, **vars(drawn))
            os.replace(partial, path)
        with np.load(path) as kept:
            return Drawn(**{key: kept[key] for key in kept.files})


def _collect(pipeline: Pipeline, asked: Mapping[str, Any], seeds: list[int]) -> Drawn:
    made = pipeline(seed=seeds, **asked)
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


def _drawn(peer: Peer, prompts: list[str], seeds: list[int]) -> Drawn:
    """A peer keeps no record: nothing is said to fire."""
    count = len(prompts)
    return Drawn(
        peer.draw(prompts, seeds), np.zeros((count, 0, 0), np.float32), np.zeros((count, 0, 0), np.bool_),
        np.zeros((count, 0, 0), np.float32),
    )  # fmt: skip


def _mask(record: SafetyRecord, concepts: list[str], tokens: int) -> npt.NDArray[np.float32]:
    return np.stack([np.array(record.token_mask.get(name, (0.0,) * tokens), np.float32) for name in concepts])


def _key(pipeline: Pipeline | Peer, identity: str, prompts: list[str], seeds: list[int]) -> str:
    if isinstance(pipeline, Peer):
        return hashlib.sha256(json.dumps([identity, prompts, seeds]).encode()).hexdigest()[:32]
    policy = pipeline.policy
    own = {name: file.sha256 for name, file in pipeline.manifest.files.items() if not name.startswith(("safety", "step"))}
    files = {name: file.sha256 for name, file in pipeline.manifest.files.items()} if identity == DEPLOYED else own
    values = [policy.enabled, policy.threshold, policy.alpha_scale, np.array(policy.cooldown)]
    rules = None if policy.unprotected else [value.tolist() for value in values]
    read = prompts if policy.unprotected else [in_plain_letters(prompt) for prompt in prompts]
    stated = json.dumps([files, identity, rules, read, seeds])
    return hashlib.sha256(stated.encode()).hexdigest()[:32]
