"""An attack by embeddings: a little of a concept in the prompt, and guidance that makes much of it.

Guidance draws n + g (c - n). An attacker who brings n = E(safe), the embedding of a safe prompt, as the negative one, and
c = E(safe) + k (E(unsafe) - E(safe)) as the prompt's, draws as if E(safe) were moved by g k: where g is large, c need not lie
near what asks for the concept. He needs the text encoder alone, and knows neither the denoiser nor its safety.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from rich.progress import track
from torch import Tensor

from saferedir.engines.errors import RequestError
from saferedir_torch.attacks.suite import SEEDS_A_PROMPT, Attempts, Draw, Pixels
from saferedir_torch.attacks.techniques import Technique, picture_of

AMPLIFIED_GUIDANCE = "amplified guidance"
#: k.
SHARES = tuple(tenth / 10 for tenth in range(1, 11))
#: As much guidance as services allow.
GUIDANCE = 12.0


class Pair(NamedTuple):
    """A prompt that asks for a concept, one that asks for something else in its place, and the words that do ask."""

    unsafe: str
    safe: str
    words: str


class Mixture(NamedTuple):
    """A pair and its k."""

    pair: Pair
    share: float

    def __str__(self) -> str:
        safe, unsafe = repr(self.pair.safe), repr(self.pair.unsafe)
        return f"{safe} + {self.share:g} ({unsafe} - {safe}), guided by {safe}"


class Conditioning(NamedTuple):
    """What requests bring in place of prompts, [R, T, D] each."""

    prompt_embeds: Tensor
    negative_prompt_embeds: Tensor


class AmplifiedGuidance:
    """The attack on some pairs, each with one k at random."""

    def __init__(
        self,
        pairs: Sequence[Pair],
        encode: Callable[[Sequence[str]], Tensor],
        *,
        shares: Sequence[float] = SHARES,
        guidance_scale: float = GUIDANCE,
        seed: int = 0,
    ) -> None:
        """`encode` gives the embeddings [B, T, D] of prompts by the text encoder that is attacked."""
        rng = np.random.default_rng([seed, *AMPLIFIED_GUIDANCE.encode()])
        self.encode, self.guidance_scale = encode, guidance_scale
        self.mixtures = [Mixture(pair, shares[int(rng.integers(len(shares)))]) for pair in pairs]
        self._of = {str(mixture): mixture for mixture in self.mixtures}

    def attempts(self, first_seed: int, *, seeds_a_prompt: int = SEEDS_A_PROMPT) -> Attempts:
        """What `attack` draws, with seeds that count up from `first_seed`; prompts are formulas that `drawing` knows."""
        rows = [mixture for mixture in self.mixtures for _ in range(seeds_a_prompt)]
        names, prompts = [row.pair.words for row in rows], [str(row) for row in rows]
        return Attempts(AMPLIFIED_GUIDANCE, names, prompts, [first_seed + row for row in range(len(rows))])

    @torch.no_grad()
    def conditioning(self, prompts: Sequence[str]) -> Conditioning:
        """The embeddings that the formulas `prompts` stand for."""
        rows = [self._of[prompt] for prompt in prompts]
        safe, unsafe = (self.encode([getattr(row.pair, side) for row in rows]) for side in ("safe", "unsafe"))
        share = torch.tensor([row.share for row in rows], device=safe.device, dtype=safe.dtype)[:, None, None]
        return Conditioning(safe + share * (unsafe - safe), safe)

    def drawing(self, technique: Technique) -> Draw:
        """Draws the formulas with `technique`, one picture at a time. Its `generate` is given no prompts, and what diffusers'
        pipelines and the runtime call `prompt_embeds`, `negative_prompt_embeds` and `guidance_scale`."""

        def draw(prompts: Sequence[str], seeds: Sequence[int], title: str) -> Pixels:
            pictures = []
            for prompt, seed in track(list(zip(prompts, seeds, strict=True)), description=title):
                given = self.conditioning([prompt])._asdict()
                try:
                    made = technique.generate([], seed=seed, guidance_scale=self.guidance_scale, **given)
                except TypeError as error:
                    raise RequestError(f"{type(technique).__name__}.generate takes no embeddings: {error}") from error
                pictures.append(picture_of(technique, made))
            return np.stack(pictures)

        return draw
