"""PixArt (arXiv 2310.00426), a diffusion transformer, with its parts under the names of a Stable Diffusion pipeline's.

Its prompts come from T5, whose padding its cross-attention leaves out. Here padding is zero in the embedding: that is how the
transformer knows it again, and redirection, which moves a token in proportion to its length, leaves it where it is.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from diffusers.configuration_utils import FrozenDict
from tokenizers import normalizers
from torch import Tensor, nn
from transformers import CLIPTextModel

#: Pipelines of diffusers, and how many tokens each gives its prompts.
PROMPT_TOKENS = {"PixArtAlphaPipeline": 120, "PixArtSigmaPipeline": 300}
#: A model of this latent size is told the picture's size and aspect ratio.
TOLD_ITS_SIZE = 128


class PromptEncoder(nn.Module):
    """T5's encoder, ids [B, T] -> embeddings [B, T, D], zero where the prompt is padded."""

    def __init__(self, encoder: nn.Module, padding: int) -> None:
        super().__init__()
        self.encoder, self.padding = encoder, padding

    def get_input_embeddings(self) -> nn.Module:
        """The embeddings of words, as transformers' models name them."""
        words: nn.Module = self.encoder.get_input_embeddings()  # type: ignore[operator]
        return words

    def forward(self, input_ids: Tensor) -> Any:
        kept = input_ids != self.padding
        hidden = self.encoder(input_ids=input_ids.long(), attention_mask=kept.long()).last_hidden_state
        return SimpleNamespace(last_hidden_state=hidden * kept.unsqueeze(-1).to(hidden.dtype))


class Denoiser(nn.Module):
    """The transformer, called as a UNet is; what it says of its own variance is left out."""

    def __init__(self, transformer: Any) -> None:
        super().__init__()
        self.transformer = transformer
        own = transformer.config
        self.config = FrozenDict({**own, "cross_attention_dim": own.caption_channels, "out_channels": own.in_channels})

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in."""
        own: torch.dtype = next(self.transformer.parameters()).dtype
        return own

    def forward(self, latent: Tensor, timestep: Tensor, prompt: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        """latent [B, C, h, w], timestep [B] or one for all, prompt [B, T, D] -> noise [B, C, h, w]."""
        kept = (prompt != 0).any(dim=-1).to(prompt.dtype)
        conditions: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
        if self.config["sample_size"] == TOLD_ITS_SIZE:
            height, width = latent.shape[2:]
            told = torch.tensor([[8.0 * height, 8.0 * width, height / width]], dtype=latent.dtype, device=latent.device)
            told = told.expand(latent.shape[0], 3)
            conditions = {"resolution": told[:, :2], "aspect_ratio": told[:, 2:]}
        output = self.transformer(
            latent, encoder_hidden_states=prompt, encoder_attention_mask=kept,
            timestep=timestep.to(latent.device).expand(latent.shape[0]),  # schedulers keep theirs on the CPU
            added_cond_kwargs=conditions, return_dict=False,
        )[0]  # fmt: skip
        return (output[:, : self.config["in_channels"]],)


class PixArt:
    """The parts of a PixArt pipeline, named as Stable Diffusion's are."""

    def __init__(
        self, *, unet: nn.Module, text_encoder: nn.Module, vae: nn.Module, tokenizer: Any, scheduler: Any,
        requires_safety_checker: bool = False,
    ) -> None:  # fmt: skip
        self.unet, self.text_encoder, self.vae = unet, text_encoder, vae
        self.tokenizer, self.scheduler = tokenizer, scheduler

    @classmethod
    def of(cls, pipeline: Any) -> PixArt:
        """The parts of diffusers' `pipeline`, whose tokenizer cleans prompts from now on as the pipeline does.

        With CLIP's text encoder in T5's place, prompts are read as Stable Diffusion reads them.
        """
        tokenizer = pipeline.tokenizer
        unet = Denoiser(pipeline.transformer).eval()
        if isinstance(pipeline.text_encoder, CLIPTextModel):
            return cls(
                unet=unet, text_encoder=pipeline.text_encoder, vae=pipeline.vae, tokenizer=tokenizer,
                scheduler=pipeline.scheduler,
            )  # fmt: skip
        tokenizer.model_max_length = PROMPT_TOKENS[type(pipeline).__name__]
        backend = tokenizer.backend_tokenizer
        steps = [normalizers.Lowercase(), normalizers.Strip()]
        backend.normalizer = normalizers.Sequence([*steps, backend.normalizer] if backend.normalizer else steps)
        return cls(
            unet=unet,
            text_encoder=PromptEncoder(pipeline.text_encoder.encoder, tokenizer.pad_token_id).eval(),
            vae=pipeline.vae, tokenizer=tokenizer, scheduler=pipeline.scheduler,
        )  # fmt: skip

    @property
    def components(self) -> dict[str, Any]:
        """All parts, by name."""
        return dict(vars(self))

    @property
    def device(self) -> torch.device:
        return next(self.unet.parameters()).device

    def to(self, device: torch.device) -> PixArt:
        """The same pipeline, on `device` from now on."""
        for part in (self.unet, self.text_encoder, self.vae):
            part.to(device)
        return self

    def register_modules(self, **parts: Any) -> None:
        """Put other parts in place of those of these names."""
        vars(self).update(parts)

    def set_progress_bar_config(self, **_: Any) -> None:
        """Nothing is drawn by this pipeline itself."""
