"""`clip_world`: the image-text score of this world, in place of CLIP's, whose weights cannot be had everywhere.

Two towers trained on renderings and captions of their own; they share no weights with the model's text encoder.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from saferedir_torch.world.clip import ImageTower, fit_towers, new_text_encoder
from saferedir_torch.world.tokenizer import MAX_TOKENS

IMAGE_FILE = "image.safetensors"
TEXT_FOLDER = "text"
STREAM = 19  # scenes that no other network has seen


class ClipWorld(nn.Module):
    """Scores pictures against prompts as CLIPScore does: 100 times the cosine, not below 0 (Hessel et al. 2021)."""

    def __init__(self, text: CLIPTextModelWithProjection, image: ImageTower, tokenizer: CLIPTokenizer) -> None:
        super().__init__()
        self.text, self.image, self.tokenizer = text, image, tokenizer

    @torch.no_grad()
    def score(self, pictures: Tensor, prompts: list[str]) -> Tensor:
        """Pictures [B, 3, 64, 64] in [-1, 1] and B prompts -> scores [B] in [0, 100]."""
        return (100 * F.cosine_similarity(self.read(prompts), self.look(pictures))).clamp(min=0)

    @torch.no_grad()
    def read(self, prompts: list[str]) -> Tensor:
        """Embeddings of prompts, [P, width]."""
        tokens = self.tokenizer(prompts, padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt").input_ids
        return torch.cat([self.text(chunk).text_embeds for chunk in torch.split(tokens, 256)])

    @torch.no_grad()
    def look(self, pictures: Tensor) -> Tensor:
        """Embeddings of pictures [B, 3, 64, 64] in [-1, 1], [B, width]."""
        return torch.cat([self.image(chunk) for chunk in torch.split(pictures, 256)])

    def save(self, folder: Path) -> None:
        self.text.half().save_pretrained(folder / TEXT_FOLDER)
        self.tokenizer.save_pretrained(folder / TEXT_FOLDER)
        save_file({key: value.half() for key, value in self.image.state_dict().items()}, folder / IMAGE_FILE)
        self.text.float()

    @classmethod
    def load(cls, folder: Path) -> ClipWorld:
        """The towers in `folder`, in fp32 and evaluation mode."""
        image = ImageTower()
        image.load_state_dict({key: value.float() for key, value in load_file(folder / IMAGE_FILE).items()})
        text = CLIPTextModelWithProjection.from_pretrained(folder / TEXT_FOLDER).float()
        return cls(text, image, CLIPTokenizer.from_pretrained(folder / TEXT_FOLDER)).eval()


def train_clip_world(folder: Path, tokenizer: CLIPTokenizer, *, seed: int = 0, steps: int = 1500) -> Path:
    """Train both towers anew, save them to `folder/clip_world` and return that path."""
    torch.manual_seed(seed + STREAM)
    text, image = new_text_encoder(tokenizer), ImageTower()
    fit_towers(text, image, tokenizer, folder, name="clip_world", seed=seed, stream=STREAM, steps=steps)
    out = folder / "clip_world"
    ClipWorld(text.eval(), image.eval(), tokenizer).save(out)
    return out
