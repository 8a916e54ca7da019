"""SAFREE (Yoon et al. 2024, arXiv 2410.12761): tokens that come close to a concept are projected away from it, untrained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from saferedir_torch.peers.peer import Batch, Peer


class Safree(Peer):
    """The prompt's embedding with trigger tokens projected, for as many early steps as the change is large.

    With C the embeddings of the concept's words as columns and P_C the projection onto their span (section 3.1): a token is a
    trigger if the prompt without it lies further from that span than the average of the prompts without another token,
    d_i > (1 + alpha) mean_j d_j. Triggers become P_I (I - P_C) p, with P_I the projection onto the span of the prompts
    without one token (equation 6). The result is used in the first gamma sigmoid(1 - cos(p, projected p)) steps of ten
    (section 3.2), here relative to the number of steps.

    The filter of the UNet's skip features in Fourier space (section 3.3) is left out.
    """

    name = "SAFREE"

    def __init__(self, pipeline: Any, words: Sequence[str], alpha: float = 0.01, gamma: float = 10.0, **drawing: Any) -> None:
        """`words` are names of what is not to be drawn."""
        super().__init__(pipeline, **drawing)
        self.alpha, self.gamma = alpha, gamma
        self._away = torch.eye(pipeline.unet.config.cross_attention_dim, device=pipeline.device) - _onto(self._sentences(words))

    def begin(self, prompts: Sequence[str], embeds: Tensor) -> Batch:
        batch = super().begin(prompts, embeds)
        projected = [self._projected(prompt, embeds) for prompt, embeds in zip(prompts, batch.embeds, strict=True)]
        batch.kept["original"] = batch.embeds
        batch.kept["projected"] = torch.stack([embeds for embeds, _ in projected])
        batch.kept["until"] = torch.tensor([steps for _, steps in projected], device=batch.embeds.device)
        return batch

    def guided(self, batch: Batch, index: int, timestep: Tensor, latent: Tensor) -> Tensor:
        early = (index < batch.kept["until"])[:, None, None]
        batch.embeds = torch.where(early, batch.kept["projected"], batch.kept["original"])
        return super().guided(batch, index, timestep, latent)

    def triggers(self, prompt: str) -> list[bool]:
        """Of every token of the prompt, whether it is close to the concept."""
        distances = (self._without_each(prompt) @ self._away.T).norm(dim=1)
        if len(distances) < 2:
            return [True] * len(distances)
        others = (distances.sum() - distances) / (len(distances) - 1)
        return [bool(trigger) for trigger in distances > (1 + self.alpha) * others]

    def _projected(self, prompt: str, embeds: Tensor) -> tuple[Tensor, float]:
        """The embedding [T, D] with its triggers projected, and the number of steps that it is for."""
        flags = self.triggers(prompt)
        if not any(flags):
            return embeds, 0.0
        within = _onto(self._without_each(prompt))
        away = embeds @ (within @ self._away).T
        mask = torch.zeros(len(embeds), dtype=torch.bool, device=embeds.device)
        mask[1 : 1 + len(flags)] = torch.tensor(flags, device=embeds.device)
        safe = torch.where(mask[:, None], away, embeds)
        likeness = torch.nn.functional.cosine_similarity(embeds.flatten(), safe.flatten(), dim=0)
        return safe, float(self.gamma * torch.sigmoid(1 - likeness)) / 10 * self.steps

    def _without_each(self, prompt: str) -> Tensor:
        """Embeddings of the prompt without its i-th token, [tokens, D]."""
        tokens = self.pipeline.tokenizer(prompt, truncation=True).input_ids[1:-1]
        texts = [self.pipeline.tokenizer.decode([*tokens[:i], *tokens[i + 1 :]]) for i in range(len(tokens))]
        return self._sentences(texts) if texts else torch.zeros(0, self._away.shape[0], device=self._away.device)

    def _sentences(self, texts: Sequence[str]) -> Tensor:
        """One embedding a text, at its end mark: [texts, D]."""
        ends = [len(self.pipeline.tokenizer(text, truncation=True).input_ids) - 1 for text in texts]
        embeds: Tensor = self.encode(texts)[torch.arange(len(texts)), torch.tensor(ends)]
        return embeds


def _onto(vectors: Tensor) -> Tensor:
    """The projection [D, D] onto the span of `vectors` [n, D]."""
    basis = vectors.double()
    projection: Tensor = torch.linalg.pinv(basis) @ basis
    return projection.float()
