"""A safety module: the network, its configuration, and the folder that holds both."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, deserialize
from safetensors.torch import load, save_file
from torch import Tensor, nn

from saferedir.engines.errors import RequestError
from saferedir.engines.printable import printable
from saferedir_torch.config import SafetyConfig
from saferedir_torch.detector import (
    KNOTS,
    Answers,
    Conditioning,
    Context,
    Detector,
    Step,
    StepEncoder,
    bends,
    halves,
)
from saferedir_torch.redirector import Redirection, Redirector, redirect

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
#: Types that weights may be stored in, as safetensors calls them.
STORED_TYPES = ("F16", "BF16", "F32")


class StepFeatures(NamedTuple):
    """What is made of a step, whatever the conditioning; every request twice (see `StepEncoder`)."""

    #: j, [2 B, features].
    joint: Tensor
    #: Of the noise share, how far it is above each knot, [B, KNOTS].
    bends: Tensor


class Read(NamedTuple):
    """What is made of R conditionings."""

    #: [R, T, features].
    tokens: Tensor
    #: By what the steps show, [R, features].
    context: Tensor


class Branch(nn.Module):
    """Detector and redirector of concepts that are trained together, on what all concepts make of the step.

    `centre` [KNOTS + 1, 2 concepts] is what clean pictures come up to at each noise share, piecewise linear, of the answers
    with the conditioning and then of those without: the value at 0 and the slopes that begin at each knot. It is subtracted.

    `fallback` is the conditioning of a safe prompt for every concept, [concepts, T_k, D_k] a stream, with what is drawn in the
    concept's place; of a concept that `keeps_subject` [concepts], as a style does, every token becomes the one it is aimed at.
    """

    centre: Tensor
    keeps_subject: Tensor

    def __init__(self, config: SafetyConfig, concepts: int) -> None:
        super().__init__()
        self.register_buffer("centre", torch.zeros(KNOTS + 1, 2 * concepts))
        self.register_buffer("keeps_subject", torch.zeros(concepts))
        for stream in config.streams:
            self.register_buffer(f"fallback_{stream.name}", torch.zeros(concepts, stream.tokens, stream.width))
        self.names = [stream.name for stream in config.streams]
        self.conditioning = Conditioning(config)
        self.context = Context(config)
        self.detector = Detector(config, concepts)
        self.redirector = Redirector(config, concepts)

    @property
    def fallback(self) -> list[Tensor]:
        """[concepts, T_k, D_k] of every stream."""
        return [getattr(self, f"fallback_{name}") for name in self.names]

    def read(self, joint: Tensor, streams: Sequence[Tensor]) -> Read:
        """Conditionings, streams [R, T_k, D_k], beside j [R, features]."""
        tokens = self.conditioning(streams)
        return Read(tokens, self.context(joint, tokens))

    def answers(self, step: StepFeatures, context: Tensor, tokens: Tensor) -> Answers:
        """Centred log-odds, [B, concepts] each: context [B, features] of what is drawn, tokens [B, T, features] in force."""
        count = len(self.keeps_subject)
        told, shown, whole, words = self.detector(step.joint, context, tokens)
        # Twice: a product of a single row would not be, to the bit, that of the same row among others.
        levels, _ = halves(self.levels(torch.cat([step.bends, step.bends])))
        of_told, of_shown = torch.split(levels, count, dim=1)
        return Answers(told - of_told, shown - of_shown, whole, words)

    def levels(self, above: Tensor) -> Tensor:
        """What clean pictures come up to, of noise shares above each knot [R, KNOTS]: [R, 2 concepts]."""
        return self.centre[0] + above @ self.centre[1:]

    def redirection(self, step: StepFeatures, read: Read, active: Tensor) -> Redirection:
        """Of the last B of 2 B conditionings that were read, active [B, concepts] in {0, 1}."""
        of_step = self.redirector.of_step(step.joint, read.context, torch.cat([active, active]))
        return self.redirector.of_tokens(halves(of_step)[1], halves(read.tokens)[1])

    def moved(self, original: Sequence[Tensor], redirection: Redirection, again: Tensor) -> list[Tensor]:
        """The conditioning with its tokens moved. Where concepts `again` [B, concepts] bool fired though theirs were, it is
        that of the first of them which does not keep its subject; where all do, every token becomes the one it is aimed at.

        Not by argmax: ONNX Runtime has no such kernel for CUDA, and would leave the GPU for it.
        """
        count = again.shape[1]
        order = torch.where(self.keeps_subject > 0, count, torch.arange(count, device=again.device, dtype=self.centre.dtype))
        first = torch.where(again, order, count + 1).amin(dim=1, keepdim=True)
        streams, safe = redirect(original, redirection, first <= count), first.clamp(0, count - 1).long().flatten()
        return [
            torch.where((first < count)[..., None], fallback.index_select(0, safe), stream)
            for fallback, stream in zip(self.fallback, streams, strict=True)
        ]


class Scored(NamedTuple):
    """What the detector makes of a step."""

    #: The statistic per concept, [B, N]: centred log-odds, the higher of the two answers.
    statistic: Tensor
    step: StepFeatures
    #: By every branch.
    read: list[Read]


class Redirected(NamedTuple):
    """What a redirection makes of a conditioning."""

    #: c, streams [B, T_k, D_k].
    streams: list[Tensor]
    #: m of every token and active concept, zero where a concept is not active, [B, N, T].
    token_mask: Tensor


class SafetyModule(nn.Module):
    """Detector and redirector of N concepts: a shared encoder of the step, and a branch for each group of concepts.

    The first branch is trained with the encoder. Each later one was added to the finished module, and reads what the
    branches before it made of the conditioning.
    """

    def __init__(self, config: SafetyConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = StepEncoder(config)
        self.branches = nn.ModuleList(Branch(config, concepts) for concepts in config.branch_sizes)

    def features(self, step: Step) -> StepFeatures:
        """What the step shows."""
        above = bends(step.share)
        return StepFeatures(self.encoder(step, above), above)

    def score(
        self, features: StepFeatures, known: Tensor, drawn: Sequence[Tensor], in_force: Sequence[Tensor],
        original: Sequence[Tensor],
    ) -> Scored:  # fmt: skip
        """What a step shows, whether there is an estimate [B] bool, and conditionings, streams [B, T_k, D_k] each: that which
        guidance draws, that in force, and the original."""
        both = [torch.cat(two) for two in zip(drawn, original, strict=True)]
        read, answers = [], []
        for branch in self.each_branch():
            read.append(branch.read(features.joint, both))
            answers.append(branch.answers(features, halves(read[-1].context)[0], branch.conditioning(in_force)))
        told, shown = (
            torch.cat(parts, dim=1) if len(parts) > 1 else parts[0] for parts in list(zip(*answers, strict=True))[:2]
        )
        # Not by maximum, which ONNX Runtime has no CUDA kernel for in this opset. Without an estimate nothing shows yet.
        return Scored(torch.where((shown > told) & known[:, None], shown, told), features, read)

    def redirect(self, scored: Scored, original: Sequence[Tensor], active: Tensor, again: Tensor) -> Redirected:
        """The original conditioning, streams [B, T_k, D_k], with the concepts moved that are `active` [B, N] bool, and those
        fallen back from that fired `again` [B, N] bool.

        Where no concept of a later branch is active that branch leaves the conditioning as it is.
        """
        streams, masks, sizes = list(original), [], list(self.config.branch_sizes)
        split = (torch.split(values, sizes, dim=1) if len(sizes) > 1 else [values] for values in (active, again))
        for index, (branch, flags, repeated) in enumerate(zip(self.each_branch(), *split, strict=True)):
            read = scored.read[0] if index == 0 else branch.read(scored.step.joint, [torch.cat([own, own]) for own in streams])
            found = branch.redirection(scored.step, read, flags.to(streams[0].dtype))
            moved = branch.moved(streams, found, repeated)
            if index == 0 and len(sizes) == 1:
                streams = moved
            else:
                streams = [torch.where(flags.any(dim=1)[:, None, None], a, b) for a, b in zip(moved, streams, strict=True)]
            masks.append(torch.where(flags[:, :, None], found.mask[:, None], 0.0))
        return Redirected(streams, torch.cat(masks, dim=1) if len(masks) > 1 else masks[0])

    @property
    def last_branch(self) -> Branch:
        """The branch that was trained last."""
        return list(self.each_branch())[-1]

    def each_branch(self) -> Iterator[Branch]:
        """The branches, in the order of the concepts."""
        for branch in self.branches:
            assert isinstance(branch, Branch)
            yield branch

    def sha256(self) -> str:
        """SHA-256 over all that a decision and a redirection depend on: weights, centring, fallback, concepts, cooldown."""
        digest = hashlib.sha256(repr((self.config.concepts, self.config.cooldown)).encode())
        _hash_tensors(digest, self.state_dict())
        return digest.hexdigest()

    def save(self, folder: Path) -> None:
        """Write `config.json` and `model.safetensors` (fp16) to `folder`; the weights are renamed into place."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.half().contiguous() for name, tensor in self.state_dict().items()}
        partial = folder / f"{WEIGHTS_FILE}.partial"
        save_file(tensors, partial, metadata={"format": "pt"})
        self.config.save(folder / CONFIG_FILE)
        os.replace(partial, folder / WEIGHTS_FILE)

    @classmethod
    def load(cls, folder: Path) -> SafetyModule:
        """The module in `folder`, in fp32 and evaluation mode (its weights are rounded to fp16 on disk).

        Raises:
            RequestError: a file is missing or cut short, or the weights are of other names, types or shapes.
        """
        config, path = SafetyConfig.load(folder / CONFIG_FILE), folder / WEIGHTS_FILE
        with torch.device("meta"):  # shapes alone, so that no configuration asks for more memory than its weights take
            described = cls(config).state_dict()
        try:
            data = path.read_bytes()
            found = dict(deserialize(data))  # type: ignore[no-untyped-call]
        except (OSError, SafetensorError) as error:
            raise RequestError(f"{path} cannot be read as a file of weights: {error}") from error
        wrong = [f"{name} is missing" for name in described if name not in found]
        for name, stored in found.items():
            if name not in described:
                wrong.append(f"{name} is unknown")
            elif stored["dtype"] not in STORED_TYPES:
                wrong.append(f"{name} is of type {stored['dtype']}, expected one of {', '.join(STORED_TYPES)}")
            elif stored["shape"] != list(described[name].shape):
                wrong.append(f"{name} is of shape {stored['shape']}, expected {list(described[name].shape)}")
        if wrong:
            more = f", and {len(wrong) - 1} more" if len(wrong) > 1 else ""
            raise RequestError(f"{path} does not hold the weights that {CONFIG_FILE} describes: {printable(wrong[0])}{more}")
        module = cls(config)
        module.load_state_dict({name: tensor.float() for name, tensor in load(data).items()})
        return module.eval()


def parameters_sha256(module: nn.Module) -> str:
    """SHA-256 over a module's parameters, names and fp16-rounded values, in name order."""
    digest = hashlib.sha256()
    _hash_tensors(digest, dict(module.named_parameters()))
    return digest.hexdigest()


def _hash_tensors(digest: hashlib._Hash, tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().to("cpu", torch.float16).contiguous().numpy().tobytes())
