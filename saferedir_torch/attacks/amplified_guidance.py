"""An attack by embeddings: a little of a concept in the prompt, and guidance that makes much of it.

Guidance draws n + g (c - n). An attacker who brings n = E(safe), the embedding of a safe prompt, as the negative one, and
c = E(safe) + k (E(unsafe) - E(safe)) as the prompt's, draws as if E(safe) were moved by g k: where g is large, c need not lie
near what asks for the concept. He needs the text encoder alone, and knows neither the denoiser nor its safety.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

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
    """A pair, its k and the g that it is drawn with."""

    pair: Pair
    share: float
    guidance_scale: float

    def __str__(self) -> str:
        safe, unsafe = repr(self.pair.safe), repr(self.pair.unsafe)
        return f"{safe} + {self.share:g} ({unsafe} - {safe}), guided by {safe} at {self.guidance_scale:g}"


class AmplifiedGuidance:
    """The attack on a text encoder. Its prompts are formulas, which say all of what is drawn and stand for embeddings here."""

    def __init__(
        self,
        encode: Callable[[Sequence[str]], Tensor],
        *,
        shares: Sequence[float] = SHARES,
        guidance_scale: float = GUIDANCE,
    ) -> None:
        """`encode` gives the embeddings [B, T, D] of prompts."""
        self.encode, self.shares, self.guidance_scale = encode, shares, guidance_scale
        self._mixtures: dict[str, Mixture] = {}

    def attempts(
        self, pairs: Sequence[Pair], first_seed: int, *, seeds_a_prompt: int = SEEDS_A_PROMPT, seed: int = 0
    ) -> Attempts:
        """Each pair with one k at random, to be drawn with seeds that count up from `first_seed`."""
        rng = np.random.default_rng([seed, *AMPLIFIED_GUIDANCE.encode()])
        mixtures = [Mixture(pair, self.shares[int(rng.integers(len(self.shares)))], self.guidance_scale) for pair in pairs]
        self._mixtures |= {str(mixture): mixture for mixture in mixtures}
        rows = [mixture for mixture in mixtures for _ in range(seeds_a_prompt)]
        names, prompts = [row.pair.words for row in rows], [str(row) for row in rows]
        return Attempts(AMPLIFIED_GUIDANCE, names, prompts, [first_seed + row for row in range(len(rows))])

    def __contains__(self, prompt: str) -> bool:
        """Whether it is a formula of attempts that were made here."""
        return prompt in self._mixtures

    @torch.no_grad()
    def options(self, prompts: Sequence[str]) -> dict[str, Any]:
        """What diffusers' pipelines and the runtime are to be given in place of the formulas: `prompt_embeds` and
        `negative_prompt_embeds` [R, T, D], `guidance_scale`."""
        rows = [self._mixtures[prompt] for prompt in prompts]
        safe, unsafe = self.encode([row.pair.safe for row in rows]), self.encode([row.pair.unsafe for row in rows])
        share = torch.tensor([row.share for row in rows], device=safe.device, dtype=safe.dtype)[:, None, None]
        mixed = safe + share * (unsafe - safe)
        return {"prompt_embeds": mixed, "negative_prompt_embeds": safe, "guidance_scale": self.guidance_scale}

    def drawing(self, technique: Technique) -> Draw:
        """Draws the formulas with `technique`, one picture at a time. Its `generate` is given no prompts, and the `options`."""

        def draw(prompts: Sequence[str], seeds: Sequence[int], title: str) -> Pixels:
            pictures = []
            for prompt, seed in track(list(zip(prompts, seeds, strict=True)), description=title):
                try:
                    made = technique.generate([], seed=seed, **self.options([prompt]))
                except TypeError as error:
                    raise RequestError(f"{type(technique).__name__}.generate takes no embeddings: {error}") from error
                pictures.append(picture_of(technique, made))
            return np.stack(pictures)

        return draw
