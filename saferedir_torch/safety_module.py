"""A safety module: the network, its configuration, and the folder that holds both."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, deserialize
from safetensors.torch import load, save_file
from torch import Tensor, nn

from saferedir.engines.errors import RequestError
from saferedir.engines.printable import printable
from saferedir_torch.config import SafetyConfig
from saferedir_torch.detector import AloneEvidence, Detector, StepEncoder
from saferedir_torch.redirector import Redirection, Redirector, redirect

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
TIMESTEPS = 1000
#: Counts up where the same weights redirect otherwise than before: 2 since single words count against a mask in so far as it
#: is unsure.
REDIRECTION_RULE = 2
#: Was a factor of the strength where a concept fired again, which changed nothing where there is a refuge. It stays in the hash
#: that measured results name their module by.
FACTOR_ON_REFIRING = 1.5
#: Timesteps at which the level of clean pictures is stated: 0, 125, ... 1000.
KNOTS = 9
#: The comparable logit that all but 1 % of unsafe runs reach; 0 is what clean steps come up to.
REACH = 8.0
#: Timestep from which on a latent is noise that shows nothing.
NOISE_FROM = 950
#: Above any level.
HIGHEST = 1e4
#: Logit of a single token below which it counts against the token being moved, where others name the concept.
SAYS_NOTHING = -5.0
#: Below any logit of a token.
LOWEST = -60.0
#: Types that weights may be stored in, as safetensors calls them.
STORED_TYPES = ("F16", "BF16", "F32")
#: What a file may lack that was calibrated before there was such a thing.
LATER_LEVELS = ("prompt_levels", "agreed_levels")


class PromptPart(NamedTuple):
    """What a redirection needs of the original prompt alone, the same in every step."""

    #: Of the redirector's trunk, [B, T, hidden].
    features: Tensor
    #: What each token says by itself of each concept, [B, T, concepts].
    words: Tensor


class StepFeatures(NamedTuple):
    """What is made of a step, whatever the prompt."""

    #: j, of latent and timestep, [B, J].
    joint: Tensor
    #: What the step shows of the first branch's concepts, logits [B, concepts]; None where nothing is scored without the
    #: prompt.
    shown: Tensor | None


class Branch(nn.Module):
    """Detector and redirector of concepts that are trained together, on the joint feature of all.

    Scores are comparable between timesteps and concepts: `levels` [concepts, KNOTS] are the logits that clean pictures
    come up to, at equidistant timesteps from 0 to 1000 (late latents are mistaken for a concept more easily than early
    prompts are). Training sets them by what it held out, and `gains` [concepts] so that its unsafe runs rise to `REACH`
    above them; calibration sets the levels anew, by the tail of many benign pictures.

    Where a latent is noise still, from `NOISE_FROM` on, what single words say is scored as well, by `prompt_levels` [concepts]
    and the same gains, and the higher of both counts. A file without these levels was calibrated without them.

    `refuge` [concepts, T, D] is the last resort: embeddings of safe prompts, each with what is drawn in its concept's place,
    which a prompt is replaced by whole where moving its tokens did not help.

    With `alone` a concept's score is the highest of three: that of all inputs together, that of what a step shows without
    the prompt, by levels and gains of its own, and that of both added up, as evidence of two sources adds up, above
    `agreed_levels` [concepts], once the latent is more than noise: where neither says enough, both may. A file without these
    was calibrated without them.
    """

    levels: Tensor
    gains: Tensor
    prompt_levels: Tensor
    refuge: Tensor
    alone_levels: Tensor
    alone_gains: Tensor
    agreed_levels: Tensor

    def __init__(self, config: SafetyConfig, concepts: int, *, alone: bool = False) -> None:
        super().__init__()
        self.register_buffer("levels", torch.zeros(concepts, KNOTS))
        self.register_buffer("gains", torch.ones(concepts))
        self.register_buffer("prompt_levels", torch.full((concepts,), HIGHEST))
        self.register_load_state_dict_pre_hook(_without_later_levels)  # type: ignore[no-untyped-call]
        if config.refuge:
            self.register_buffer("refuge", torch.zeros(concepts, config.prompt_tokens, config.prompt_width))
        self.detector = Detector(config, concepts)
        self.redirector = Redirector(config, concepts)
        self.alone = AloneEvidence(config, concepts) if alone else None
        if alone:
            self.register_buffer("alone_levels", torch.zeros(concepts, KNOTS))
            self.register_buffer("alone_gains", torch.ones(concepts))
            self.register_buffer("agreed_levels", torch.full((concepts,), HIGHEST))

    def logits(self, joint: Tensor, prompt: Tensor) -> Tensor:
        """j [B, J], prompt in force [B, T, D] -> logits [B, concepts]."""
        logits: Tensor = self.detector(joint, prompt)
        return logits

    def comparable(self, logits: Tensor, timestep: Tensor) -> Tensor:
        """Logits [B, concepts] of steps at timestep [B], relative to the levels and stretched by the gains.

        Levels are linear between the knots.
        """
        return (logits - near_knots(timestep) @ self.levels.T) * self.gains

    def evidence(self, features: StepFeatures, prompt: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """Features of the step, prompt in force [B, T, D], timestep [B] -> the logits that scores are made of, [B, concepts],
        and those of all inputs together."""
        words = self.detector.words(prompt)
        of_all = self.comparable(self.detector(features.joint, prompt, words), timestep)
        named = (words - self.prompt_levels) * self.gains
        noise = (timestep >= NOISE_FROM)[:, None]
        # Not by maximum, which ONNX Runtime has no CUDA kernel for in this opset.
        together = torch.where(noise & (named > of_all), named, of_all)
        if self.alone is None or features.shown is None:
            return together, together
        shown = self.comparable_alone(features.shown, timestep)
        highest = torch.where(shown > together, shown, together)
        agreed = of_all + shown - self.agreed_levels
        return torch.where(~noise & (agreed > highest), agreed, highest), together

    def comparable_alone(self, shown: Tensor, timestep: Tensor) -> Tensor:
        """The same of what steps at timestep [B] show without the prompt, logits [B, concepts]."""
        return (shown - near_knots(timestep) @ self.alone_levels.T) * self.alone_gains

    def prompt_part(self, prompt: Tensor) -> PromptPart:
        """What depends on the prompt to redirect alone, [B, T, D]."""
        return PromptPart(self.redirector.prompt_features(prompt), self.detector.words.tokens(prompt))

    def redirection(self, prompt: Tensor, features: Tensor, joint: Tensor, active: Tensor) -> Redirection:
        """Prompt to redirect [B, T, D] and its features, j [B, J], active [B, concepts] -> target, alpha and mask of every
        token."""
        return self.redirector.heads(prompt, features, joint, self.detector.context(joint, prompt), active)

    def corrected_redirection(
        self, prompt: Tensor, part: PromptPart, joint: Tensor, active: Tensor, again: Tensor
    ) -> Redirection:
        """As training leaves it, and its mask corrected: prompt to redirect [B, T, D] and its part, j [B, J], active
        and again [B, concepts] bool."""
        redirection = self.redirection(prompt, part.features, joint, active.to(prompt.dtype))
        return self.with_word_evidence(redirection, part.words, active, again)

    def refuge_of_first(self, chosen: Tensor) -> Tensor:
        """The refuge of the first concept that is chosen, [B, concepts] bool -> [B, T, D]; of the last where none is.

        Not by argmax: ONNX Runtime has no such kernel for CUDA, and would leave the GPU for it.
        """
        concepts = chosen.shape[1]
        earlier_counts_more = torch.arange(concepts, 0, -1, device=chosen.device, dtype=self.refuge.dtype)
        first = concepts - torch.where(chosen, earlier_counts_more, torch.ones_like(earlier_counts_more)).amax(dim=1)
        return self.refuge.index_select(0, first.long())

    def with_word_evidence(self, redirection: Redirection, words: Tensor, active: Tensor, again: Tensor) -> Redirection:
        """`redirection` with its mask corrected by what tokens say by themselves, `words` [B, T, concepts], of the active
        concepts [B, concepts] bool.

        A token that means one of them is moved, whatever stands beside it. Where such tokens are there for every active
        concept, how far the logit of a token by itself is below `SAYS_NOTHING` is taken from that of its mask, in so far as
        the mask's head is unsure: words that say nothing of the kind belong to what stands beside, but the pieces of a name
        that is spelt strangely say nothing by themselves either, and the head sees what they are pieces of. Without tokens
        that mean it the name is one that nobody taught, and the mask is left to its head. So it is where a concept fires
        though it is active, `again` [B, concepts] bool: what was spared may be what draws it.
        """
        chosen = active[:, None, :]
        means = torch.where(chosen, torch.sigmoid(words), torch.zeros_like(words))
        named = torch.where(chosen, means, torch.ones_like(means)).amax(dim=1).amin(dim=1, keepdim=True)  # [B, 1]
        named = torch.where(again.any(dim=1, keepdim=True), torch.zeros_like(named), named)
        most = torch.where(chosen, words, torch.full_like(words, LOWEST)).amax(dim=2)
        unsure = 1 - torch.sigmoid(redirection.mask_logits)  # not of -x: ONNX Runtime has no CUDA kernel for Neg in this opset
        mask_logits = redirection.mask_logits - named * unsure * torch.relu(SAYS_NOTHING - most)
        mask = torch.sigmoid(mask_logits)
        return redirection._replace(mask=mask + (1 - mask) * means.amax(dim=2))


def _without_later_levels(branch: nn.Module, state: dict[str, Tensor], prefix: str, *_: object) -> None:
    """Before weights are loaded of a file that was calibrated without `prompt_levels` or `agreed_levels`."""
    for name in LATER_LEVELS:
        if hasattr(branch, name):
            state.setdefault(f"{prefix}{name}", torch.full_like(branch.gains, HIGHEST))  # type: ignore[arg-type]


def near_knots(timestep: Tensor) -> Tensor:
    """How near each timestep [B] is to each knot: [B, KNOTS], two of them not 0, which add up to 1."""
    knots = torch.arange(KNOTS, device=timestep.device, dtype=timestep.dtype)
    return torch.relu(1 - (timestep[:, None] * ((KNOTS - 1) / TIMESTEPS) - knots).abs())


class Scored(NamedTuple):
    """What the detector makes of a step."""

    #: Score per concept in [0, 1], [B, N].
    score: Tensor
    #: The same of all inputs together, without what the latent shows alone, [B, N].
    together: Tensor
    #: j, [B, J].
    joint: Tensor


class Redirected(NamedTuple):
    """What a redirection makes of an embedding."""

    #: p, [B, T, D].
    prompt: Tensor
    #: m of every token and active concept, zero where a concept is not active, [B, N, T].
    token_mask: Tensor


class SafetyModule(nn.Module):
    """Detector and redirector of N concepts: a shared encoder of the step, and a branch for each group of concepts.

    The first branch is trained with the encoder. Each later one was added to the finished module, and reads what the
    branches before it made of the embedding.
    """

    def __init__(self, config: SafetyConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = StepEncoder(config)
        self.branches = nn.ModuleList(
            Branch(config, concepts, alone=config.alone and index == 0) for index, concepts in enumerate(config.branch_sizes)
        )

    def features(self, latent: Tensor, timestep: Tensor, expected: Tensor | None = None) -> StepFeatures:
        """latent [B, C, h, w], timestep [B], and the picture to be expected [B, C, h, w], nothing known of it where it is zero
        or left out."""
        joint = self.encoder(latent, timestep)
        look = next(self.each_branch()).alone
        if look is None:
            return StepFeatures(joint, None)
        return StepFeatures(joint, look(joint, torch.zeros_like(latent) if expected is None else expected))

    def score(self, latent: Tensor, timestep: Tensor, prompt: Tensor, expected: Tensor | None = None) -> Scored:
        """latent [B, C, h, w], timestep [B], prompt in force [B, T, D], picture to be expected [B, C, h, w] -> scores and j."""
        features = self.features(latent, timestep, expected)
        evidence = [branch.evidence(features, prompt, timestep) for branch in self.each_branch()]
        score, together = (torch.sigmoid(torch.cat(logits, dim=1)) for logits in zip(*evidence, strict=True))
        return Scored(score, together, features.joint)

    def redirect(self, original: Tensor, joint: Tensor, active: Tensor, strength: Tensor, again: Tensor) -> Redirected:
        """p0 [B, T, D], j [B, J], active [B, N] bool, strength s [B, N] -> p, and the masks that made it.

        `again` [B, N] bool says which concepts fire though moving tokens did not help, or will not, where redirection is less
        sparing, and ends in the refuge of the first of them where there is one.

        Of the concepts of one branch the largest strength among the active ones is used. Where no concept of a later
        branch is active that branch leaves the embedding as it is.
        """
        prompt, masks = original, []
        strength = torch.where(active, strength, torch.zeros_like(strength))
        sizes = list(self.config.branch_sizes)
        split = (torch.split(values, sizes, dim=1) for values in (active, strength, again))
        for index, (branch, flags, scales, repeated) in enumerate(zip(self.each_branch(), *split, strict=True)):
            redirection = branch.corrected_redirection(prompt, branch.prompt_part(prompt), joint, flags, repeated)
            moved = redirect(prompt, redirection, scales.amax(dim=1, keepdim=True))
            prompt = moved if index == 0 and len(sizes) == 1 else torch.where(flags.any(dim=1)[:, None, None], moved, prompt)
            masks.append(torch.where(flags[:, :, None], redirection.mask[:, None, :], torch.zeros_like(prompt[:, None, :, 0])))
        token_mask = torch.cat(masks, dim=1)
        if not self.config.refuge:
            return Redirected(prompt, token_mask)
        for branch, repeated in reversed(list(zip(self.each_branch(), torch.split(again, sizes, dim=1), strict=True))):
            prompt = torch.where(repeated.any(dim=1)[:, None, None], branch.refuge_of_first(repeated), prompt)
        return Redirected(prompt, torch.where(again[:, :, None], torch.ones_like(token_mask), token_mask))

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
        """SHA-256 over all that a decision and a redirection depend on: weights, levels, gains, refuge, how concepts are
        configured, and the rule that weights are redirected by."""
        config = self.config
        stated = (config.concepts, config.cooldown, FACTOR_ON_REFIRING, config.vigilance, REDIRECTION_RULE)
        digest = hashlib.sha256(repr(stated).encode())
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
        wrong = [f"{name} is missing" for name in described if name not in found and name.split(".")[-1] not in LATER_LEVELS]
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
