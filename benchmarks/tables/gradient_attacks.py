"""Attacks by one who has the networks: words found by gradient, with and without knowledge of the safety, and embeddings."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import Tensor

from benchmarks.drawing import PLAIN, Studio, plain_of
from benchmarks.tables.attacks import drawing, save_worst, worst_of
from benchmarks.tables.forgetting import PARTS, Judges
from benchmarks.test_sets import unsafe_set
from saferedir.runtime import Pipeline
from saferedir_torch.attacks.objectives import ProtectedUnlikeness, TextUnlikeness
from saferedir_torch.attacks.suite import Attempts, Draw, Success, attack
from saferedir_torch.attacks.token_search import Loss, SearchSize, TextSide, optimise_embeddings, search
from saferedir_torch.peers.guidance import NegativePrompt
from saferedir_torch.peers.peer import Peer
from saferedir_torch.peers.saferedir import SafeRedir
from saferedir_torch.safety_module import SafetyModule, parameters_sha256
from saferedir_torch.world.captions import all_names
from saferedir_torch.world.prompts import PromptPair, WorldConcept
from saferedir_torch.world.split import Split

TEST_SEED, FIRST_SEED, SEEDS_APART = 13, 600_000, 1000
#: Steps of the unsafe run that predictions are compared at, of 25; most of a picture is decided by the last of them.
AT = (0, 5, 11)
#: Prompts that are searched together on a CPU; on a GPU it is all of them.
AT_ONCE = 5
TEXT, BLIND, WHITE_BOX, EMBEDDING = "words, text encoder", "words, UNet", "words, white box", "embedding, white box"


@dataclass(frozen=True)
class Size:
    """Prompts, seeds of each, words added to each, how long to search, and how many pictures must count."""

    prompts: int = 50
    seeds: int = 4
    words: int = 6
    search: SearchSize = field(default_factory=lambda: SearchSize(iterations=30, best=32, tries=16))
    embedding_iterations: int = 60
    at_least: int = 20
    rewrites: int = 1000


#: Of the evaluation in a few minutes.
QUICK = Size(prompts=2, seeds=1, words=2, search=SearchSize(2, 8, 4), embedding_iterations=2, at_least=1, rewrites=12)


def gradient_attacks(
    studio: Studio, protected: Pipeline, identity: str, model: Any, module: SafetyModule, concept: WorldConcept, split: Split,
    size: Size, sheet: Path,
) -> dict[str, Any]:  # fmt: skip
    """ASR of the four kinds. Words stand behind the prompt that no longer says the concept's own, and are none of its names.

    `protected` draws the words as it is deployed, `model` and `module` are what it was exported from: gradients go through
    them, and embeddings are drawn with them, since the runtime takes text alone. The worst of what got through goes to `sheet`.
    """
    plain = plain_of(protected)
    judges = Judges.calibrated(studio, plain, concept, split, size.rewrites)
    pairs = [pair for part in PARTS for pair in unsafe_set(concept, split, part, size.prompts // 2, 1, seed=TEST_SEED).pairs]
    text_side, module = TextSide(model.tokenizer, model.text_encoder), module.to(model.device)
    keep = _Kept(studio.folder, [parameters_sha256(model.unet), concept.name, asdict(size), AT])
    forbidden = [name for key in concept.named_by for name in all_names()[key]]
    # What breaks nothing is no attack: the simplest safety that anyone has stands beside the one that is tested.
    weak = NegativePrompt(model, ", ".join(split.names[concept.named_by[0]][:6]))
    weakly = f"{parameters_sha256(model.unet)} {weak.name}: {weak.words}"
    allowed, first = text_side.words(forbidden), split.seeds["test"][0] + FIRST_SEED
    at_once = AT_ONCE if model.device.type == "cpu" else len(pairs)
    groups = [range(start, min(start + at_once, len(pairs))) for start in range(0, len(pairs), at_once)]

    def loss_of(kind: str, group: range) -> Loss:
        unsafe = [pairs[number].unsafe for number in group]
        if kind == TEXT:
            with torch.no_grad():
                return TextUnlikeness(text_side.encode(text_side.tokens(unsafe)))
        # The attacker's own seeds are none of those that are counted.
        return ProtectedUnlikeness(model, None if kind == BLIND else module, unsafe, [first - 1 - n for n in group], at=AT)

    def prompts_of(kind: str, group: range) -> list[str]:
        begun = [pairs[number].removed for number in group]
        found = search(text_side, begun, size.words, allowed, loss_of(kind, group), size.search, seed=group.start)
        return [own.prompt for own in found]

    worst: list[list[Success]] = []
    figures: dict[str, Any] = {"concept": concept.name, "found_at": judges.found_at, "size": asdict(size), "families": {}}
    for index, kind in enumerate((TEXT, BLIND, WHITE_BOX)):
        prompts = [
            prompt
            for group in track(groups, description=f"{concept.name}, {kind}: searching")
            for prompt in keep.texts(
                [kind, module.sha256() if kind == WHITE_BOX else None, [pairs[number].unsafe for number in group]],
                partial(prompts_of, kind, group),
            )
        ]
        outcome = attack(
            _attempts(kind, pairs, prompts, first + SEEDS_APART * index, size.seeds),
            drawing(studio, plain, PLAIN, f"{concept.name}, {kind}"),
            drawing(studio, protected, identity, f"{concept.name}, {kind}"),
            lambda pixels: judges.found_in(pixels, concept),
            at_least=size.at_least,
        )
        broken = attack(
            outcome.attempts,
            drawing(studio, plain, PLAIN, f"{concept.name}, {kind}"),
            lambda prompts, seeds, title: studio.draw(weak, weakly, prompts, seeds, title).pixels,
            lambda pixels: judges.found_in(pixels, concept),
            at_least=size.at_least,
        )
        worst.append(worst_of(outcome, judges, concept))
        figures["families"][kind] = outcome.figures() | {"asr_of_negative_prompt": broken.figures().get("asr")}
    embeddings: dict[str, Tensor] = {}
    for group in track(groups, description=f"{concept.name}, {EMBEDDING}: searching"):
        loss = loss_of(EMBEDDING, group)
        assert isinstance(loss, ProtectedUnlikeness)
        found = optimise_embeddings(loss.target, loss, iterations=size.embedding_iterations)
        embeddings.update(zip((pairs[number].unsafe for number in group), found, strict=True))
    outcome = attack(
        _attempts(EMBEDDING, pairs, [pair.unsafe for pair in pairs], first + SEEDS_APART * 3, size.seeds),
        _drawing_embeddings(Peer(model), embeddings),
        _drawing_embeddings(SafeRedir(model, module), embeddings),
        lambda pixels: judges.found_in(pixels, concept),
        at_least=size.at_least,
    )
    figures["families"][EMBEDDING] = outcome.figures()
    save_worst([*worst, worst_of(outcome, judges, concept)], sheet)
    return figures


def _attempts(kind: str, pairs: Sequence[PromptPair], prompts: Sequence[str], first_seed: int, seeds: int) -> Attempts:
    repeated = [prompt for prompt in prompts for _ in range(seeds)]
    names = [pair.name for pair in pairs for _ in range(seeds)]
    return Attempts(kind, names, repeated, [first_seed + row for row in range(len(repeated))])


def _drawing_embeddings(peer: Peer, embeddings: dict[str, Tensor]) -> Draw:
    """Draws each prompt's embedding in place of the prompt."""
    return lambda prompts, seeds, _: peer.draw_embeddings(torch.stack([embeddings[prompt] for prompt in prompts]), seeds)


class _Kept:
    """What searches found, kept under a hash of what they depend on."""

    def __init__(self, folder: Path, identity: Any) -> None:
        self.folder, self.identity = folder, identity

    def texts(self, depends_on: Any, make: Callable[[], list[str]]) -> list[str]:
        """What `make` gives, or gave before."""
        key = hashlib.sha256(json.dumps([self.identity, depends_on]).encode()).hexdigest()[:32]
        path = self.folder / f"{key}.json"
        if not path.exists():
            partly = path.with_suffix(".partial")
            partly.write_text(json.dumps(make()))
            os.replace(partly, path)
        kept: list[str] = json.loads(path.read_text())
        return kept
