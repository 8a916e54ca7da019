"""Training for models made of the embedded one: latents of painted scenes, the loop, samples, and the folder that is saved."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from saferedir_torch.models import save_in_half
from saferedir_torch.peers.peer import Peer
from saferedir_torch.precision import mixed_precision
from saferedir_torch.training_run import ExponentialAverage, Schedule, run_training
from saferedir_torch.trajectories import tokenize
from saferedir_torch.world.batches import save_sheet
from saferedir_torch.world.captions import varied_caption
from saferedir_torch.world.scenes import Painter, Scene, random_scene

BATCH = 48
EMPTY_PROMPT_SHARE = 0.1
SAMPLE_PROMPTS = (
    "a church", "a house next to a cat", "a dagger on teal", "a balloon as a sticker", "a dog in ink style", "a crown",
    "a chapel beside a sailboat", "an animal in sepia style",
)  # fmt: skip

LossOfStep = Callable[[int], tuple[Tensor, dict[str, float]]]


@dataclass(frozen=True)
class Bank:
    """Scaled latents of pictures [N, C, h, w] and what they show, drawn from `seed`."""

    latents: Tensor
    scenes: list[Scene]

    @classmethod
    def painted(cls, pipeline: Any, paint: Painter, size: int, seed: int) -> Bank:
        """`size` random scenes as `paint` paints them."""
        scenes = [random_scene(np.random.default_rng([seed, 71, row])) for row in range(size)]
        parts = []
        with torch.no_grad(), mixed_precision(pipeline.device):
            for start in range(0, size, 100):
                rng = np.random.default_rng([seed, 72, start])
                pixels = torch.from_numpy(np.stack([paint(scene, rng) for scene in scenes[start : start + 100]]))
                pictures = pixels.permute(0, 3, 1, 2).to(pipeline.device).float() / 127.5 - 1
                parts.append(pipeline.vae.encode(pictures).latent_dist.mode().float() * pipeline.vae.config.scaling_factor)
        return cls(torch.cat(parts), scenes)

    def batch(self, seed: int, step: int, empty_share: float = EMPTY_PROMPT_SHARE) -> tuple[Tensor, list[str], torch.Generator]:
        """Latents and prompts of one step, and a generator for its noise."""
        rng = np.random.default_rng([seed, 73, step])
        rows = rng.integers(len(self.scenes), size=BATCH)
        prompts = ["" if rng.random() < empty_share else varied_caption(self.scenes[row], rng) for row in rows]
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        return self.latents[torch.from_numpy(rows).to(self.latents.device)], prompts, generator


def embed(pipeline: Any, prompts: Sequence[str]) -> Tensor:
    """Prompt embeddings [B, T, D] on the model's device."""
    ids = tokenize(pipeline.tokenizer, list(prompts)).to(pipeline.device)
    embeds: Tensor = pipeline.text_encoder(ids).last_hidden_state
    return embeds


def train_denoiser(
    pipeline: Any, folder: Path, loss_of_step: LossOfStep, average: ExponentialAverage, *, steps: int, rate: float,
    text_rate: float | None = None,
) -> None:  # fmt: skip
    """Optimise the denoiser, with a `text_rate` the text encoder as well; its weights are the averaged ones in the end."""
    modules: dict[str, nn.Module] = {"unet": pipeline.unet}
    groups: list[dict[str, Any]] = [{"params": list(pipeline.unet.parameters()), "lr": rate}]
    if text_rate is not None:
        modules["text"] = pipeline.text_encoder
        groups.append({"params": list(pipeline.text_encoder.parameters()), "lr": text_rate})

    def loss(step: int) -> tuple[Tensor, dict[str, float]]:
        with mixed_precision(pipeline.device), _attention(pipeline.device):
            return loss_of_step(step)

    run_training(
        folder=folder, name="unet", modules=modules, optimizer=torch.optim.AdamW(groups, weight_decay=0.01),
        schedule=Schedule(total_steps=steps, warmup_steps=min(200, steps // 10)), loss_of_step=loss, averages={"unet": average},
    )  # fmt: skip
    pipeline.unet.load_state_dict({**pipeline.unet.state_dict(), **average.state_dict()})
    pipeline.unet.eval()


def _attention(device: torch.device) -> AbstractContextManager[None]:
    """On a CPU attention in plain products: with the fused kernel, whose gradient takes 44 % of it, a step of the transformer
    takes 1.4 times as long."""
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext()


def save_samples(pipeline: Any, folder: Path, *, steps: int = 25, guidance_scale: float = 5.0) -> None:
    """A picture of each of `SAMPLE_PROMPTS`, to `folder/samples.png`."""
    prompts = list(SAMPLE_PROMPTS)
    drawn = Peer(pipeline, steps=steps, guidance_scale=guidance_scale).draw(prompts, range(len(prompts)))
    pictures = torch.from_numpy(drawn).permute(0, 3, 1, 2).float() / 127.5 - 1
    save_sheet(pictures, folder / "samples.png", columns=len(SAMPLE_PROMPTS) // 2)


def save_model(pipeline: Any, folder: Path) -> Path:
    """Save the pipeline, in fp16, to `folder/model`, which is returned."""
    out = folder / "model"
    save_in_half(pipeline, out)
    return out
