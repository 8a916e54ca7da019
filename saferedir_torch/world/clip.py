"""Contrastive pre-training of the text encoder against a small image tower, as CLIP's was before Stable Diffusion.

Synonyms that are drawn alike come to lie close together, which the diffusion model then starts from.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from saferedir_torch.precision import mixed_precision
from saferedir_torch.training_run import Schedule, run_training
from saferedir_torch.world.batches import picture_batch
from saferedir_torch.world.captions import varied_caption
from saferedir_torch.world.scenes import random_scene

BATCH = 128
WIDTH = 128
PROJECTION = 96


class ImageTower(nn.Module):
    """Pictures [B, 3, 64, 64] in [-1, 1] -> embedding [B, 96]. Keeps the left and the right half apart."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 32, 64, 96, 128)
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.GroupNorm(8, after), nn.SiLU()]
        self.convolutions = nn.Sequential(*layers)
        self.head = nn.Sequential(nn.Linear(128 * 16, 256), nn.SiLU(), nn.Linear(256, PROJECTION))

    def forward(self, pictures: Tensor) -> Tensor:
        features = self.convolutions(pictures)
        projected: Tensor = self.head(features.flatten(1))
        return projected


def new_text_encoder(tokenizer: CLIPTokenizer, width: int = WIDTH) -> CLIPTextModelWithProjection:
    """An untrained text encoder: 3 layers, 4 heads, 77 positions."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=tokenizer.model_max_length,
        projection_dim=PROJECTION,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModelWithProjection(config)


def train_clip(folder: Path, *, seed: int = 0, steps: int = 1000) -> Path:
    """Train both towers, save the text tower to `folder/clip` and return that path."""
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    torch.manual_seed(seed)
    text, image = new_text_encoder(tokenizer), ImageTower()
    fit_towers(text, image, tokenizer, folder, name="clip", seed=seed, stream=2, steps=steps)
    out = folder / "clip"
    text.eval().save_pretrained(out)
    return out


def fit_towers(
    text: CLIPTextModelWithProjection,
    image: ImageTower,
    tokenizer: CLIPTokenizer,
    folder: Path,
    *,
    name: str,
    seed: int,
    stream: int,
    steps: int,
) -> None:
    """Train both towers with the symmetric InfoNCE loss on fresh scenes; `stream` keeps the scenes of one use apart."""
    device = text.device
    scale = nn.Parameter(torch.tensor(np.log(1 / 0.07), dtype=torch.float32, device=device))
    holder = nn.ParameterList([scale])
    optimizer = torch.optim.AdamW([*text.parameters(), *image.parameters(), scale], lr=1.5e-3, weight_decay=0.02)
    targets = torch.arange(BATCH, device=device)

    def loss_of_step(step: int) -> tuple[Tensor, dict[str, float]]:
        rng = np.random.default_rng([seed, stream, step])
        scenes = [random_scene(rng) for _ in range(BATCH)]
        tokens = tokenizer(
            [varied_caption(scene, rng) for scene in scenes], padding=True, truncation=True, return_tensors="pt"
        ).input_ids.to(device)
        with mixed_precision(device):
            text_features = text(tokens).text_embeds
            image_features = image(picture_batch(scenes, rng).to(device))
        a, b = F.normalize(text_features.float(), dim=-1), F.normalize(image_features.float(), dim=-1)
        logits = scale.exp().clamp(max=100) * a @ b.T
        loss = (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2
        accuracy = (logits.argmax(1) == targets).float().mean()
        return loss, {"accuracy": float(accuracy)}

    run_training(
        folder=folder,
        name=name,
        modules={"text": text, "image": image, "scale": holder},
        optimizer=optimizer,
        schedule=Schedule(total_steps=steps),
        loss_of_step=loss_of_step,
    )
