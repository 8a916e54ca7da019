"""What one optimisation step of safety training learns from, and what it is validated on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saferedir_torch.alignment import changed_tokens
from saferedir_torch.cases import DetectionBatch, Seen, batch_of, choose, what_is_to_be_seen
from saferedir_torch.estimate import shown_estimate
from saferedir_torch.losses import detection_loss, redirection_loss
from saferedir_torch.safety_module import SafetyModule
from saferedir_torch.training_data import PICTURE_SHOWS, LatentBank, PairBank

STEP_BATCH = 160
PAIR_BATCH = 96
WORD_BATCH = 128
ALONE_BATCH = 256
#: Share of the redirector's cases in which nothing is to change, where it is taught on its own.
UNTOUCHED_SHARE = 0.25
#: Strength s of the redirection formula that step lengths are trained for.
STRENGTH = 1.5
#: A token is to be moved where 1 - cos exceeds this: the largest value of the oracle ladder at which exact targets forget
#: as well as the full rewrite.
TAU = 0.1
VALIDATION_SHARE = 0.1
#: How many held-out steps and pairs are looked at.
VALIDATION_STEPS, VALIDATION_PAIRS = 1500, 400
#: Share of detector cases whose latent is taken from another run, so that neither input can be ignored.
SWAP_SHARE = 0.3
#: Share of detector cases whose prompt is one of the pairs', which are many more than the recorded runs'.
PAIRED_SHARE = 0.5
#: Share of the concepts a prompt does not ask for that the redirector is told are active all the same.
FALSELY_ACTIVE_SHARE = 0.2
#: Share of detector cases whose latent is the last of a run, noised anew to a random timestep.
RENOISED_SHARE = 0.4
#: Share of the cases without the prompt in which nothing is known of the picture to be expected.
UNEXPECTED_SHARE = 0.15
#: Embeddings whose standard deviation is taken for that of all.
NOISE_MEASURED_ON = 10_000
#: Noise on prompt embeddings, in units of their standard deviation: names never seen lie near seen ones.
PROMPT_NOISE = 0.15


class Learner:
    """Draws batches by step number, and measures on the runs and pairs that training leaves out.

    `alphas` [1000]: the scheduler's cumulative signal shares. The last branch of `module` is taught, with the encoder
    where it is the only one; labels and pairs are of its concepts. Runs and pairs lie on a GPU that `module` is on and that has
    room for them, else on the CPU. Batches are chosen alike whatever the device; only noise is its own. They hold `scale`
    times as many cases as what two cores can bear.
    """

    def __init__(
        self, module: SafetyModule, bank: LatentBank, pairs: PairBank, alphas: Tensor, seed: int, *, tau: float = TAU,
        scale: int = 1,
    ) -> None:  # fmt: skip
        self.tau, self.scale = tau, scale
        self.branch = module.last_branch
        if len(module.branches) > 1:
            # The encoder was taught without these concepts and stays as it is: what shows in a latent is left open.
            bank = replace(bank, shown=torch.where(bank.shown > 0, torch.full_like(bank.shown, -1), bank.shown))
        self.device = next(module.parameters()).device
        self.store = _place(self.device, bank, pairs)
        bank, pairs = bank.to(self.store), pairs.to(self.store)
        self.module, self.bank, self.pairs, self.alphas, self.seed = module, bank, pairs, alphas.to(self.store), seed
        rng = np.random.default_rng([seed, 31])
        run_count = int(bank.run.max()) + 1
        held = torch.zeros(run_count, dtype=torch.bool, device=self.store)
        held[self._stored(rng.permutation(run_count)[: max(1, int(run_count * VALIDATION_SHARE))])] = True
        row_held = held[bank.run]
        self.train_rows, self.held_rows = torch.where(~row_held)[0], torch.where(row_held)[0]
        # Runs lie one after another, each in the order of its steps.
        self.last_row = torch.bincount(bank.run, minlength=run_count).cumsum(dim=0) - 1
        order = self._stored(rng.permutation(len(pairs.asked)))
        cut = max(1, int(len(order) * VALIDATION_SHARE))
        self.held_pairs, self.train_pairs = order[:cut], order[cut:]
        changes = pairs.replaced[self.train_pairs].any(dim=1)
        self.changing_pairs, self.untouched_pairs = self.train_pairs[changes], self.train_pairs[~changes]
        self.noise_scale = PROMPT_NOISE * float(pairs.original[:NOISE_MEASURED_ON].float().std())

    def loss_of_step(self, step: int) -> tuple[Tensor, dict[str, float]]:
        """The loss of one optimisation step, and its parts; everything random comes from `step`."""
        detected, parts = self.detection_of_step(step)
        moved, moved_parts = self._moved(step, [(self.train_pairs, PAIR_BATCH * self.scale)])
        return detected + moved, parts | moved_parts

    def redirection_of_step(self, step: int) -> tuple[Tensor, dict[str, float]]:
        """What the redirector is taught on its own: more of the pairs in which something is to change."""
        size = PAIR_BATCH * self.scale
        untouched = int(size * UNTOUCHED_SHARE)
        return self._moved(step, [(self.changing_pairs, size - untouched), (self.untouched_pairs, untouched)])

    def _moved(self, step: int, drawn_from: Sequence[tuple[Tensor, int]]) -> tuple[Tensor, dict[str, float]]:
        """The redirection loss of pairs drawn from each of some pools, so many of each."""
        rng = np.random.default_rng([self.seed, 35, step])
        generator = self._noise_of(self.seed * 1_000_003 + step + 500_000)
        chosen = torch.cat([self._any_of(pool, size, rng) for pool, size in drawn_from])
        shown = self._any_of(self.train_rows, len(chosen), rng)
        return self._redirection(chosen, shown, rng, generator)

    def detection_of_step(self, step: int) -> tuple[Tensor, dict[str, float]]:
        """The detector's share of it."""
        batch = DetectionBatch(*(tensor.to(self.device) for tensor in self.detection_batch(step)))
        joint = self.module.encoder(batch.latent, batch.timestep)
        detected = detection_loss(self.branch.logits(joint, batch.prompt), batch.labels, batch.weights)
        return detected, {"detection": float(detected.detach())}

    def words_of_step(self, step: int) -> tuple[Tensor, dict[str, float]]:
        """What single words are taught: whether a pair's prompts ask for a concept, its rewrite as it is aimed at included.

        The words are to tell it without the end-of-text tokens as well, every one of which sums up the whole prompt and
        would leave them nothing to learn.
        """
        rng = np.random.default_rng([self.seed, 36, step])
        generator = self._noise_of(self.seed * 1_000_003 + step + 800_000)
        chosen = self._any_of(self.train_pairs, WORD_BATCH * self.scale, rng)
        pairs, evidence = self.pairs, self.branch.detector.words
        asked, left = pairs.asked[chosen], pairs.asked[chosen] * (1 - pairs.replaced[chosen])
        prompt = self._noisy(torch.cat([pairs.original[chosen].float(), pairs.target[chosen].float()]), generator)
        logits = evidence.tokens(prompt)  # [2 W, T, N]
        of_words = logits[: len(chosen)].masked_fill(~pairs.words[chosen][:, :, None].to(self.device), -torch.inf)
        parts = torch.cat([torch.logsumexp(logits, dim=1), torch.logsumexp(of_words, dim=1)])
        labels = torch.cat([asked, left, asked]).to(self.device)
        loss = detection_loss(parts, labels, torch.ones_like(labels))
        return loss, {"words": float(loss.detach())}

    def alone_of_step(self, step: int) -> tuple[Tensor, dict[str, float]]:
        """What is to be told of a step without the prompt: what it shows, or, where it cannot show it yet, what the prompt
        asks for that it follows. At times nothing is known of the picture to be expected, as where a sampler adds noise."""
        rng = np.random.default_rng([self.seed, 37, step])
        size = ALONE_BATCH * self.scale
        at = self._stored(rng.integers(len(self.train_rows), size=size))
        rows, unknown = self.train_rows[at], self._stored(rng.random(size) < UNEXPECTED_SHARE)
        known = self._expected(rows)
        expected = choose(unknown, torch.zeros_like(known), known)
        labels, weights = what_is_to_be_seen(self.bank.asked[rows], self.bank.shown[rows])
        assert self.branch.alone is not None
        logits = self.branch.alone(self._joint_in_training[at].float().to(self.device), expected.to(self.device))
        loss = detection_loss(logits, labels.to(self.device), weights.to(self.device))
        return loss, {"alone": float(loss.detach())}

    @cached_property
    def _joint_in_training(self) -> Tensor:
        """j of all steps that are trained on, [S, J] fp16, which no part changes that is taught by them."""
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            parts = []
            for rows in torch.split(self.train_rows, 512):
                seen = self._seen(rows)
                joint = self.module.encoder(seen.latent.to(self.device), seen.timestep.to(self.device))
                parts.append(joint.half().to(self.store))
            return torch.cat(parts)

    def _expected(self, rows: Tensor) -> Tensor:
        """The pictures to be expected in the steps `rows` [S], [S, C, h, w]; zero in the first step of a run."""
        return shown_estimate(self.bank.denoised[rows])

    def shown(self, rows: Tensor) -> Tensor:
        """What the steps `rows` [S] show without a prompt, logits [S, N]."""
        seen = self._seen(rows)
        shown = self.module.features(
            *(part.to(self.device) for part in (seen.latent, seen.timestep, self._expected(rows)))
        ).shown  # fmt: skip
        assert shown is not None
        return shown

    def detection_batch(self, step: int) -> DetectionBatch:
        """What the detector is shown in one step."""
        rng = np.random.default_rng([self.seed, 32, step])
        generator, size = self._noise_of(self.seed * 1_000_003 + step), STEP_BATCH * self.scale
        rows = self._any_of(self.train_rows, size, rng)
        swap = self._stored(rng.random(size) < SWAP_SHARE)
        other = self._any_of(self.train_rows, size, rng)
        paired = self._stored(rng.random(size) < PAIRED_SHARE)
        named = self._any_of(self.train_pairs, size, rng)
        prompt = choose(paired, self.pairs.original[named], self._prompts(rows))
        asked = choose(paired, self.pairs.asked[named], self.bank.asked[rows])
        looked_at = torch.where(swap | paired, other, rows)
        seen = self._seen(looked_at)
        renoised = self._stored(rng.random(size) < RENOISED_SHARE)
        anew = self._renoised(self.last_row[self.bank.run[looked_at]], generator)
        seen = Seen(*(choose(renoised, new, old) for new, old in zip(anew, seen, strict=True)))
        return batch_of(self._noisy(prompt, generator), asked, seen)

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Losses and detector accuracy on held-out runs and pairs."""
        rng = np.random.default_rng([self.seed, 33])
        rows = self._any_of(self.held_rows, VALIDATION_STEPS, rng)
        batch = batch_of(self._prompts(rows), self.bank.asked[rows], self._seen(rows))
        detected = detection_loss(self._logits(batch.prompt, rows), batch.labels.cpu(), batch.weights.cpu())
        accuracy = self._accuracy(rows)
        chosen = self.held_pairs[:VALIDATION_PAIRS]
        shown = self._any_of(self.held_rows, len(chosen), rng)
        moved, parts = self._redirection(chosen, shown, rng, None)
        if self.branch.alone is not None:
            labels, weights = what_is_to_be_seen(self.bank.asked[rows].cpu(), self.bank.shown[rows].cpu())
            parts["alone"] = float(detection_loss(self._alone(rows), labels, weights))
        return {"loss": float(detected) + float(moved), "detection": float(detected), "accuracy": accuracy, **parts}

    @torch.no_grad()
    def held_logits(self, *, alone: bool = False) -> Tensor:
        """Of every step that training leaves out, in the order of `held_rows`, [S, N]; `alone`: without the prompt."""
        rows = self.held_rows
        return self._alone(rows) if alone else self._logits(self._prompts(rows), rows)

    def _stored(self, values: Any) -> Tensor:
        """An array of numpy's where runs and pairs lie."""
        return torch.from_numpy(values).to(self.store)

    def _any_of(self, pool: Tensor, size: int, rng: np.random.Generator) -> Tensor:
        """`size` of the rows in `pool`, where runs and pairs lie."""
        return pool[self._stored(rng.integers(len(pool), size=size))]

    def _prompts(self, rows: Tensor) -> Tensor:
        return self.bank.prompts[self.bank.prompt[rows]]

    def _seen(self, rows: Tensor) -> Seen:
        return Seen(self.bank.latent[rows].float(), self.bank.timestep[rows], self.bank.shown[rows])

    def _renoised(self, rows: Tensor, generator: torch.Generator) -> Seen:
        """The latents of `rows` carried on to later times by the forward process, z_t = sqrt(a) z + sqrt(1 - a) n: more
        looks at what a run drew than its own steps give."""
        latent, before, shown = self._seen(rows)
        device = generator.device
        later = torch.randint(0, len(self.alphas), before.shape, generator=generator, device=device)
        timestep = torch.maximum(later.to(before), before)
        kept = (self.alphas[timestep.long()] / self.alphas[before.long()])[:, None, None, None]
        noise = torch.randn(latent.shape, generator=generator, device=device).to(latent)
        unclear = (shown > 0) & (timestep >= PICTURE_SHOWS)[:, None]
        shown = torch.where(unclear, torch.full_like(shown, -1.0), shown)
        return Seen(kept.sqrt() * latent + (1 - kept).sqrt() * noise, timestep, shown)

    def _redirection(
        self, chosen: Tensor, shown: Tensor, rng: np.random.Generator, generator: torch.Generator | None
    ) -> tuple[Tensor, dict[str, float]]:
        pairs = self.pairs
        clean, target = (side[chosen].to(self.device).float() for side in (pairs.original, pairs.target))
        mask = changed_tokens(clean, target, self.tau)
        # The target stays clean: what is strange about a name is to be removed, not carried over.
        original = self._noisy(clean, generator)
        active = self._active(chosen, rng).to(self.device)
        joint = self.module.encoder(self.bank.latent[shown].float().to(self.device), self.bank.timestep[shown].to(self.device))
        features = self.branch.redirector.prompt_features(original)
        redirection = self.branch.redirection(original, features, joint, active)
        return redirection_loss(redirection, original, target, mask, strength=STRENGTH)

    def _active(self, chosen: Tensor, rng: np.random.Generator) -> Tensor:
        """Concepts that are active with each pair: those that its target is without, and by chance such as it does not
        ask for; at least one."""
        asked, replaced = self.pairs.asked[chosen], self.pairs.replaced[chosen]
        by_chance = self._stored(rng.random(asked.shape) < FALSELY_ACTIVE_SHARE).float() * (1 - asked)
        active = torch.maximum(replaced, by_chance)
        one = torch.nn.functional.one_hot(self._stored(rng.integers(asked.shape[1], size=len(chosen))), asked.shape[1])
        return torch.where(active.sum(dim=1, keepdim=True) > 0, active, one.float())

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

    def _logits(self, prompt: Tensor, rows: Tensor) -> Tensor:
        """prompt [S, T, D] seen with the latents and timesteps of `rows` [S] -> logits [S, N]."""
        bank = self.bank
        parts = []
        for embeds, chunk in zip(torch.split(prompt, 512), torch.split(rows, 512), strict=True):
            joint = self.module.encoder(bank.latent[chunk].float().to(self.device), bank.timestep[chunk].to(self.device))
            parts.append(self.branch.logits(joint, embeds.to(self.device).float()).cpu())
        return torch.cat(parts)

    def _alone(self, rows: Tensor) -> Tensor:
        return torch.cat([self.shown(chunk).cpu() for chunk in torch.split(rows, 512)])

    def _accuracy(self, rows: Tensor) -> float:
        asked, shown = self.bank.asked[rows].cpu(), self.bank.shown[rows].cpu()
        known = (asked > 0) | (shown >= 0)
        truth = torch.maximum(asked, shown.clamp(min=0)) > 0
        return float(((self._logits(self._prompts(rows), rows) >= 0) == truth)[known].float().mean())


def _place(device: torch.device, *banks: LatentBank | PairBank) -> torch.device:
    """Where banks are to lie: on `device` if that is a GPU with twice the memory free that they take, else on the CPU."""
    if device.type != "cuda":
        return torch.device("cpu")
    taken = sum(value.nbytes for bank in banks for value in vars(bank).values() if isinstance(value, Tensor))
    return device if torch.cuda.mem_get_info(device)[0] > 2 * taken else torch.device("cpu")
