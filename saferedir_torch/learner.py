"""What one optimisation step of safety training learns from, and what it is validated on."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from saferedir_torch.alignment import changed_tokens
from saferedir_torch.controller import amplification
from saferedir_torch.detector import Step
from saferedir_torch.estimate import shown_estimate
from saferedir_torch.losses import detection_loss, redirection_loss
from saferedir_torch.pairs import PairBank
from saferedir_torch.runs import RunBank
from saferedir_torch.safety_module import SafetyModule, StepFeatures

STEP_BATCH, PAIR_BATCH = 160, 160
#: A token is to be moved where 1 - cos exceeds this: the largest value of the oracle ladder at which exact targets forget
#: as well as the full rewrite.
TAU = 0.1
VALIDATION_SHARE = 0.1
#: How many held-out steps and pairs are looked at.
VALIDATION_STEPS, VALIDATION_PAIRS = 1500, 400
#: Shares of detector cases with the conditioning of the run itself, with a prompt of the pairs, and with the rewrite that such
#: a prompt is redirected to; with the others a prompt is on its way from its rewrite, which it is guided away from.
OWN_SHARE, PAIRED_SHARE, TARGET_SHARE = 0.3, 0.35, 0.15
#: How far on its way a prompt asks for nothing yet, and asks for its concept, at the usual guidance scale.
LITTLE, MUCH = 0.15, 0.4
#: Share of cases in which guidance exceeds the usual scale, up to this one.
AMPLIFIED_SHARE, HIGHEST_GUIDANCE = 0.5, 12.0
#: Share of cases whose latent is noised anew, of what its run drew in the end, so that more is seen of it than its own steps.
RENOISED_SHARE = 0.4
#: Share of cases in which nothing is known of the picture to come.
UNKNOWN_SHARE = 0.12
#: Share of the concepts a prompt does not ask for that the redirector is told are active all the same.
FALSELY_ACTIVE_SHARE = 0.2
#: Share of the redirector's cases in which nothing is to change.
UNTOUCHED_SHARE = 0.3
#: Embeddings whose standard deviation is taken for that of all, and noise on embeddings in its units: names never seen lie near
#: seen ones.
NOISE_MEASURED_ON, PROMPT_NOISE = 10_000, 0.15
#: Share of the redirector's pairs of which the prompt is on its way from its rewrite, as guidance amplifies it, and how far it
#: is at least.
PARTIAL_SHARE, SHORTEST_WAY = 0.25, 0.2
PARTS_WEIGHT = 0.25


def held_out(runs: int, rng: np.random.Generator) -> Tensor:
    """Which of the recorded runs training leaves out, [runs] bool."""
    held = torch.zeros(runs, dtype=torch.bool)
    held[torch.from_numpy(rng.permutation(runs)[: max(1, int(runs * VALIDATION_SHARE))])] = True
    return held


def split_of(seed: int) -> np.random.Generator:
    """What draws the runs and pairs that the training of `seed` leaves out."""
    return np.random.default_rng([seed, 31])


class Cases(NamedTuple):
    """Cases for the detector."""

    step: Step
    #: The conditioning that guidance draws, and that in force, [S, T, D] both.
    drawn: Tensor
    in_force: Tensor
    #: 1 asked for by what is drawn, 0 not, -1 open, [S, N].
    asked: Tensor
    #: 1 named by the words in force, 0 not, -1 open, [S, N].
    named: Tensor
    #: 1 shown by the step, 0 not, -1 open, [S, N].
    shown: Tensor
    #: What the prompt of the step's own run asks for, [S, N].
    run_asked: Tensor
    #: Whether the prompt asks for it by words that are not known to mean it, [S, N] bool.
    unknown: Tensor
    #: Tokens that stand before the prompt's end of text, where that is known, and all where it is not, [S, T] bool.
    before_end: Tensor

    @property
    def told(self) -> tuple[Tensor, Tensor]:
        """Labels with the conditioning, and where they are sure, [S, N].

        Known words settle it: what shows against them is for the answer without them to say. Of others the picture tells.
        """
        pictured = self.unknown | (self.asked < 0)
        labels = torch.where(pictured, torch.maximum(self.asked, self.shown), self.asked)
        sure = torch.where(pictured, (labels > 0) | (self.asked == 0) & (self.shown == 0), self.asked >= 0)
        return labels.clamp(min=0), sure.float()


class Learner:
    """Draws batches by step number, and measures on the runs and pairs that training leaves out.

    The last branch of `module` is taught, with the encoder where it is the only one; labels and pairs are of its concepts.
    Runs and pairs lie on a GPU that `module` is on and that has room for them, else on the CPU. Batches are chosen alike
    whatever the device; only noise is its own. They hold `scale` times as many cases as what two cores can bear.
    """

    def __init__(
        self, module: SafetyModule, bank: RunBank, pairs: PairBank, seed: int, *, tau: float = TAU, scale: int = 1
    ) -> None:
        self.tau, self.scale, self.module, self.branch, self.seed = tau, scale, module, module.last_branch, seed
        if len(module.branches) > 1:
            # The encoder was taught without these concepts and stays as it is: what shows in a latent is left open.
            bank = replace(bank, shown=torch.where(bank.shown > 0, -1.0, bank.shown))
        self.device = next(module.parameters()).device
        self.store = _place(self.device, bank, pairs)
        self.bank, self.pairs = bank.to(self.store), pairs.to(self.store)
        rng = split_of(seed)
        count = int(bank.run.max()) + 1
        held = held_out(count, rng).to(self.store)
        self.train_rows, self.held_rows = (torch.where(rows)[0] for rows in (~held[self.bank.run], held[self.bank.run]))
        # Runs lie one after another, each in the order of its steps.
        self.last_row = torch.bincount(self.bank.run, minlength=count).cumsum(dim=0) - 1
        order = self._stored(rng.permutation(len(pairs.asked)))
        cut = max(1, int(len(order) * VALIDATION_SHARE))
        self.held_pairs, self.train_pairs = order[:cut], order[cut:]
        changes = self.pairs.replaced[self.train_pairs].any(dim=1)
        self.changing_pairs, self.untouched_pairs = self.train_pairs[changes], self.train_pairs[~changes]
        self.noise_scale = PROMPT_NOISE * float(pairs.original[:NOISE_MEASURED_ON].float().std())

    def loss_of_step(self, step: int) -> tuple[Tensor, dict[str, float]]:
        """The loss of one optimisation step, and its parts; everything random comes from `step`."""
        rng, generator = np.random.default_rng([self.seed, 35, step]), self._noise_of(self.seed * 1_000_003 + step + 500_000)
        cases = self.cases_of_step(step)
        size = PAIR_BATCH * self.scale
        untouched = round(size * UNTOUCHED_SHARE)
        chosen = torch.cat([
            self._any_of(self.changing_pairs, size - untouched, rng), self._any_of(self.untouched_pairs, untouched, rng),
        ])  # fmt: skip
        beside = self._steps(self._any_of(self.train_rows, size, rng))
        every = self.module.features(Step(*(torch.cat(both) for both in zip(cases.step, beside, strict=True))))
        detected, parts = self._detection(cases, _rows(every, 0, len(cases.asked)))
        moved, moved_parts = self._redirection(chosen, _rows(every, len(cases.asked), size), rng, generator)
        return detected + moved, parts | moved_parts

    def cases_of_step(self, step: int) -> Cases:
        """What the detector is shown in one step."""
        rng, generator = np.random.default_rng([self.seed, 32, step]), self._noise_of(self.seed * 1_000_003 + step)
        return self._cases(self._any_of(self.train_rows, STEP_BATCH * self.scale, rng), rng, generator)

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Losses and detector accuracy on held-out runs and pairs."""
        rng = np.random.default_rng([self.seed, 33])
        rows = self._any_of(self.held_rows, VALIDATION_STEPS, rng)
        sums: dict[str, float] = {}
        chunks = torch.split(rows, 500)
        for chunk in chunks:
            cases = self._cases(chunk, rng, None)
            detected, parts = self._detection(cases, self.module.features(cases.step))
            for key, value in {"loss": float(detected), **parts}.items():
                sums[key] = sums.get(key, 0.0) + value / len(chunks)
        chosen = self.held_pairs[:VALIDATION_PAIRS]
        beside = self.module.features(self._steps(self._any_of(self.held_rows, len(chosen), rng)))
        moved, parts = self._redirection(chosen, beside, rng, None)
        return {**sums, "loss": sums["loss"] + float(moved), **parts}

    def _detection(self, cases: Cases, step: StepFeatures) -> tuple[Tensor, dict[str, float]]:
        context = self.branch.read(step.joint[: len(cases.drawn)], [cases.drawn]).context
        tokens = self.branch.conditioning([cases.in_force])
        answers = self.branch.answers(step, context, tokens)
        told, sure = cases.told
        seen = torch.where(cases.shown >= 0, cases.shown, cases.run_asked)
        visible = ((cases.shown >= 0) | (cases.run_asked > 0)).float()
        # Words are to tell it without the end-of-text tokens as well: each of these sums up the whole prompt, and would leave
        # them nothing to learn.
        by_words = self.branch.detector.words(tokens).masked_fill(~cases.before_end[:, :, None], -torch.inf)
        known, asks = (cases.named >= 0).float(), cases.named.clamp(min=0)
        parts = {
            "told": detection_loss(answers.told, told, sure),
            "shown": detection_loss(answers.shown, seen, visible),
            # What single words settle, the whole is to learn as well.
            "whole": detection_loss(answers.whole, told, sure),
            "words": detection_loss(answers.words, asks, known) + detection_loss(torch.logsumexp(by_words, dim=1), asks, known),
        }
        right = (((answers.told >= 0) == (told > 0)) * sure).sum() / sure.sum().clamp(min=1)
        loss = parts["told"] + parts["shown"] + PARTS_WEIGHT * (parts["whole"] + parts["words"])
        return loss, {**{key: float(value.detach()) for key, value in parts.items()}, "accuracy": float(right)}

    def _redirection(
        self, chosen: Tensor, step: StepFeatures, rng: np.random.Generator, generator: torch.Generator | None
    ) -> tuple[Tensor, dict[str, float]]:
        clean, target = (side[chosen].to(self.device).float() for side in (self.pairs.original, self.pairs.target))
        mask = changed_tokens(clean, target, self.tau)
        if generator is not None:
            clean = _partial(clean, target, rng)
        # The target stays clean: what is strange about a name is to be removed, not carried over.
        original = self._noisy(clean, generator)
        joint, active = step.joint[: len(original)], self._active(chosen, rng).to(self.device)
        read = self.branch.read(joint, [original])
        found = self.branch.redirector(joint, read.context, active, read.tokens)
        return redirection_loss(found, original, target, mask)

    def _cases(self, rows: Tensor, rng: np.random.Generator, generator: torch.Generator | None) -> Cases:
        """What the detector is shown of the steps `rows` [S]: with the prompt of their run, or with another."""
        size, bank, pairs = len(rows), self.bank, self.pairs
        step = self._steps(rows, rng, generator)
        pool = self.train_pairs if generator is not None else self.held_pairs
        other, beside = self._any_of(pool, size, rng), self._any_of(self.untouched_pairs, size, rng)
        kind = self._stored(rng.random(size))
        own, paired, targeted = (
            kind < OWN_SHARE,
            kind < OWN_SHARE + PAIRED_SHARE,
            kind < OWN_SHARE + PAIRED_SHARE + TARGET_SHARE,
        )
        unsafe, target = (side[other].to(self.device).float() for side in (pairs.original, pairs.target))
        asked, left = pairs.asked[other], pairs.asked[other] * (1 - pairs.replaced[other])
        way = self._stored(rng.uniform(0.1, 1.0, size)).float()
        scale = self._stored(np.where(rng.random(size) < AMPLIFIED_SHARE, rng.uniform(5.0, HIGHEST_GUIDANCE, size), 5.0))
        amount = torch.tensor([amplification(float(one)) for one in scale])
        drawn = _on_the_way(way * (1 + amount).to(way), asked, pairs.replaced[other])  # at the usual guidance scale
        named = _on_the_way(way, asked, pairs.replaced[other])
        moving = target + way[:, None, None].to(self.device) * (unsafe - target)
        mine, negative = (bank.prompts[index[rows]].to(self.device).float() for index in (bank.prompt, bank.negative))
        empty_or_benign = _choose(
            self._stored(rng.random(size) < 0.5).to(self.device), negative, pairs.original[beside].to(self.device).float()
        )
        where = [flags.to(self.device) for flags in (own, paired, targeted)]
        prompt = _choose(where[0], mine, _choose(where[1], unsafe, _choose(where[2], target, moving)))
        against = _choose(where[0], negative, _choose(where[2], empty_or_benign, target))
        guided = prompt + amount.to(self.device)[:, None, None] * (prompt - against)
        asks, names = (
            _choose(own, bank.asked[rows], _choose(paired, asked, _choose(targeted, left, moved))) for moved in (drawn, named)
        )
        shown = bank.shown[rows]
        on = self.device
        beside_pairs = (paired & ~own)[:, None]
        unknown, before_end = beside_pairs & (pairs.replaced[other] > asked), pairs.words[other] | ~beside_pairs
        labels = (label.to(on) for label in (asks, names, shown, bank.asked[rows], unknown, before_end))
        return Cases(step, self._noisy(guided, generator), self._noisy(prompt, generator), *labels)

    def _steps(self, rows: Tensor, rng: np.random.Generator | None = None, generator: torch.Generator | None = None) -> Step:
        """What the steps `rows` [S] show; with random numbers some latents are noised anew, and some estimates unknown."""
        bank = self.bank
        latent, estimate, share = bank.latent[rows].float(), shown_estimate(bank.denoised[rows]), bank.share[rows]
        if rng is not None and generator is not None:
            size = len(rows)
            anew = self._renoised(rows, generator)
            latent = _choose(self._stored(rng.random(size) < RENOISED_SHARE), anew, latent)
            mirrored = self._stored(rng.random(size) < 0.5)  # so that more is seen of each picture
            latent, estimate = (_choose(mirrored, picture.flip(3), picture) for picture in (latent, estimate))
            estimate = _choose(self._stored(rng.random(size) < UNKNOWN_SHARE), torch.zeros_like(estimate), estimate)
        return Step(latent.to(self.device), estimate.to(self.device), share.to(self.device))

    def _renoised(self, rows: Tensor, generator: torch.Generator) -> Tensor:
        """The last latents of the runs of `rows`, carried back to the levels of these by the forward process."""
        last = self.last_row[self.bank.run[rows]]
        (alpha_last, sigma_last), (alpha, sigma) = (_level(self.bank.share[own]) for own in (last, rows))
        kept = alpha / alpha_last
        fresh = (sigma.square() - (kept * sigma_last).square()).clamp(min=0).sqrt()
        noise = torch.randn(self.bank.latent[last].shape, generator=generator, device=generator.device).to(kept)
        return kept[:, None, None, None] * self.bank.latent[last].float() + fresh[:, None, None, None] * noise

    def _active(self, chosen: Tensor, rng: np.random.Generator) -> Tensor:
        """Concepts that are active with each pair: those that its target is without, and by chance such as it does not
        ask for; at least one."""
        asked, replaced = self.pairs.asked[chosen], self.pairs.replaced[chosen]
        by_chance = self._stored(rng.random(asked.shape) < FALSELY_ACTIVE_SHARE).float() * (1 - asked)
        active = torch.maximum(replaced, by_chance)
        one = torch.nn.functional.one_hot(self._stored(rng.integers(asked.shape[1], size=len(chosen))), asked.shape[1])
        return torch.where(active.sum(dim=1, keepdim=True) > 0, active, one.float())

    def _stored(self, values: Any) -> Tensor:
        """An array of numpy's where runs and pairs lie."""
        return torch.from_numpy(values).to(self.store)

    def _any_of(self, pool: Tensor, size: int, rng: np.random.Generator) -> Tensor:
        """`size` of the rows in `pool`, where runs and pairs lie."""
        return pool[self._stored(rng.integers(len(pool), size=size))]

    def _noise_of(self, seed: int) -> torch.Generator:
        """Where noise, much the largest part of a batch, comes from: a GPU draws its own."""
        return torch.Generator(self.device if self.device.type == "cuda" else "cpu").manual_seed(seed)

    def _noisy(self, prompt: Tensor, generator: torch.Generator | None) -> Tensor:
        """`prompt` in fp32 on the module's device, with noise of a random strength where there is a generator."""
        clean = prompt.to(self.device).float()
        if generator is None:
            return clean
        amount = torch.rand(len(prompt), 1, 1, generator=generator, device=generator.device) * self.noise_scale
        noise = torch.randn(prompt.shape, generator=generator, device=generator.device)
        return clean + (amount * noise).to(self.device)


def _rows(features: StepFeatures, start: int, count: int) -> StepFeatures:
    """Of features of B requests, every one twice, those of `count` from `start` on."""
    rows = slice(start, start + count)
    return StepFeatures(torch.cat([half[rows] for half in features.joint.chunk(2)]), features.bends[rows])


def _level(share: Tensor) -> tuple[Tensor, Tensor]:
    """alpha and sigma of noise shares s = sigma / (alpha + sigma), of latents with alpha^2 + sigma^2 = 1."""
    length = (share.square() + (1 - share).square()).sqrt()
    return (1 - share) / length, share / length


def _on_the_way(strength: Tensor, asked: Tensor, replaced: Tensor) -> Tensor:
    """What prompts that are `strength` [S] of the way from their rewrite ask for, if the whole asks for `asked` [S, N] and the
    rewrite is without `replaced` [S, N]: open in between."""
    moved = torch.where(
        (strength >= MUCH)[:, None], asked, torch.where((strength <= LITTLE)[:, None], asked * (1 - replaced), -1.0)
    )
    return torch.where(replaced > 0, moved, asked)


def _partial(unsafe: Tensor, target: Tensor, rng: np.random.Generator) -> Tensor:
    """Prompts [B, T, D], a share of them part of the way from their rewrites `target`."""
    way, partial = rng.uniform(SHORTEST_WAY, 1.0, len(unsafe)), rng.random(len(unsafe)) < PARTIAL_SHARE
    return torch.lerp(target, unsafe, torch.from_numpy(np.where(partial, way, 1.0)).to(unsafe)[:, None, None])


def _choose(where: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Rows of `first` where `where` [S] is true, else of `second`."""
    return torch.where(where.reshape(-1, *[1] * (first.dim() - 1)), first, second)


def _place(device: torch.device, *banks: RunBank | PairBank) -> torch.device:
    """Where banks are to lie: on `device` if that is a GPU with twice the memory free that they take, else on the CPU."""
    if device.type != "cuda":
        return torch.device("cpu")
    taken = sum(value.nbytes for bank in banks for value in vars(bank).values() if isinstance(value, Tensor))
    return device if torch.cuda.mem_get_info(device)[0] > 2 * taken else torch.device("cpu")
