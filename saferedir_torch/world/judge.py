"""The judge: an image classifier of objects, style and background, independent of everything it judges.

Trained on renderings of its own seeds and augmentations; it shares no weights and no pictures with the base model or
with safety training, and is never consulted by either.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from saferedir_torch.precision import mixed_precision
from saferedir_torch.training_run import Schedule, run_training
from saferedir_torch.world.batches import picture_batch
from saferedir_torch.world.scenes import Painter, Scene, draw, random_scene
from saferedir_torch.world.vocabulary import load_vocabulary

JUDGE_FILE = "judge.safetensors"
BATCH = 96
PAIR_SHARE = 0.65  # small objects are the harder ones
BLANK_SHARE = 0.05  # a picture of nothing must not look like anything

Architecture = Literal["plain", "residual"]


class Recipe(NamedTuple):
    """How a judge is trained."""

    name: str
    #: This word of the seed sequence keeps the judge's pictures apart from all others.
    stream: int
    steps: int
    #: Share of pictures whose objects fade into the background, as the base model draws some.
    faint_share: float


RECIPES: dict[Architecture, Recipe] = {
    "plain": Recipe("judge", stream=7, steps=9000, faint_share=0.4),
    "residual": Recipe("second_judge", stream=17, steps=3600, faint_share=0.0),
}


class Opinion(NamedTuple):
    """What the judge sees: probabilities."""

    #: Is the object anywhere in the picture, [B, objects], each in [0, 1].
    objects: Tensor
    #: [B, styles], summing to 1.
    style: Tensor
    #: [B, backgrounds], summing to 1.
    background: Tensor

    def of(self, keys: Sequence[str]) -> Tensor:
        """Probability of the likeliest of `keys`, objects or styles: [B]."""
        vocabulary = load_vocabulary()
        objects, styles = vocabulary.object_keys, vocabulary.style_keys
        columns = [self.style[:, styles.index(key)] if key in styles else self.objects[:, objects.index(key)] for key in keys]
        return torch.stack(columns, dim=1).max(dim=1).values


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut, group-normalised."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(before, after, 3, stride=stride, padding=1)
        self.second = nn.Conv2d(after, after, 3, padding=1)
        self.first_norm, self.second_norm = nn.GroupNorm(8, after), nn.GroupNorm(8, after)
        self.shortcut = nn.Conv2d(before, after, 1, stride=stride)

    def forward(self, features: Tensor) -> Tensor:
        hidden = F.silu(self.first_norm(self.first(features)))
        return F.silu(self.second_norm(self.second(hidden)) + self.shortcut(features))


def _plain(widths: Sequence[int]) -> tuple[nn.Sequential, int]:
    """Strided and batch-normalised convolutions in a row; what stands where is kept."""
    layers: list[nn.Module] = []
    before = 3
    for width in widths:
        layers += [nn.Conv2d(before, width, 3, stride=2, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
        layers += [nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
        before = width
    return nn.Sequential(*layers), before * 16


def _residual(widths: Sequence[int]) -> tuple[nn.Sequential, int]:
    """Residual blocks, the last at an eighth of the size, and the strongest of each feature, wherever it stands."""
    layers: list[nn.Module] = [nn.Conv2d(3, widths[0], 5, stride=2, padding=2)]
    for index, (before, after) in enumerate(pairwise(widths)):
        layers.append(ResidualBlock(before, after, stride=2 if index < 2 else 1))
    return nn.Sequential(*layers, nn.AdaptiveMaxPool2d(1)), widths[-1]


class Judge(nn.Module):
    """Pictures [B, 3, 64, 64] in [-1, 1] -> logits of objects, style, background.

    `architecture` is "plain" for the judge, "residual" for the second judge, of which the world's feature measures read
    the blocks as well.
    """

    def __init__(self, architecture: Architecture = "plain") -> None:
        super().__init__()
        self.architecture = architecture
        vocabulary = load_vocabulary()
        self.sizes = [len(vocabulary.objects), len(vocabulary.styles), len(vocabulary.backgrounds)]
        self.convolutions, features = _plain((32, 64, 128, 192)) if architecture == "plain" else _residual((32, 64, 96, 192))
        self.head = nn.Sequential(nn.Linear(features, 384), nn.ReLU(), nn.Dropout(0.2), nn.Linear(384, sum(self.sizes)))

    def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        features = self.convolutions(pictures).flatten(1)
        objects, style, background = self.head(features).split(self.sizes, dim=1)
        return objects, style, background

    @torch.no_grad()
    def judge(self, pictures: Tensor) -> Opinion:
        """Pictures [B, 3, 64, 64] in [-1, 1] -> probabilities."""
        parts = [self(chunk) for chunk in torch.split(pictures, 256)]
        objects, style, background = (torch.cat(column) for column in zip(*parts, strict=True))
        return Opinion(objects.sigmoid(), style.softmax(1), background.softmax(1))

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {k: v.half() if v.is_floating_point() else v for k, v in self.state_dict().items()}
        save_file(tensors, folder / JUDGE_FILE, metadata={"architecture": self.architecture})

    @classmethod
    def load(cls, folder: Path) -> Judge:
        with safe_open(folder / JUDGE_FILE, "pt") as file:
            judge = cls((file.metadata() or {}).get("architecture", "plain"))
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        judge.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in state.items()})
        return judge.eval()


def train_judge(
    folder: Path, *, seed: int = 0, steps: int | None = None, architecture: Architecture = "plain", paint: Painter = draw,
    start: Path | None = None,
) -> Path:  # fmt: skip
    """Train on fresh renderings by `paint`, for as many steps as the recipe says, save to `folder/judge` (or
    `folder/second_judge`) and return that path. Training begins with the judge in `start`, of the same architecture."""
    recipe = RECIPES[architecture]
    torch.manual_seed(seed + 70 + recipe.stream)
    judge = Judge(architecture)
    if start is not None:
        judge.load_state_dict(Judge.load(start).state_dict())
    optimizer = torch.optim.AdamW(judge.parameters(), lr=2e-3, weight_decay=0.02)

    def loss_of_step(step: int) -> tuple[Tensor, dict[str, float]]:
        rng = np.random.default_rng([seed, recipe.stream, step])
        scenes = [random_scene(rng, PAIR_SHARE) for _ in range(BATCH)]
        scenes = [replace(scene, objects=()) if rng.random() < BLANK_SHARE else scene for scene in scenes]
        pictures = augment(picture_batch(scenes, rng, paint), rng, recipe.faint_share)
        with mixed_precision(torch.device("cpu")):
            objects, style, background = (logits.float() for logits in judge(pictures))
        labels = label(scenes)
        styled = labels.objects.any(dim=1).float()  # nothing has no style
        loss = (
            10 * F.binary_cross_entropy_with_logits(objects, labels.objects)
            + (F.cross_entropy(style, labels.style.argmax(1), reduction="none") * styled).sum() / styled.sum()
            + F.cross_entropy(background, labels.background.argmax(1))
        )
        return loss, {}

    run_training(
        folder=folder,
        name=recipe.name,
        modules={"judge": judge},
        optimizer=optimizer,
        schedule=Schedule(total_steps=steps or recipe.steps, warmup_steps=100),
        loss_of_step=loss_of_step,
    )
    out = folder / recipe.name
    judge.eval().save(out)
    return out


def label(scenes: Sequence[Scene]) -> Opinion:
    """The truth about `scenes` in the judge's terms."""
    vocabulary = load_vocabulary()
    keys, styles, backgrounds = vocabulary.object_keys, vocabulary.style_keys, vocabulary.background_keys
    objects = torch.zeros(len(scenes), len(keys))
    style, background = torch.zeros(len(scenes), len(styles)), torch.zeros(len(scenes), len(backgrounds))
    for row, scene in enumerate(scenes):
        for key in scene.objects:
            objects[row, keys.index(key)] = 1
        style[row, styles.index(scene.style)] = 1
        background[row, backgrounds.index(scene.background)] = 1
    return Opinion(objects, style, background)


def augment(pictures: Tensor, rng: np.random.Generator, faint_share: float) -> Tensor:
    """Fading, shift, blur, paleness, noise, brightness, contrast: what tells a generated picture from a rendering."""
    out = []
    for picture in pictures:
        if faint_share and rng.random() < faint_share:
            # From left to right, so that one of two objects may fade and the other not; the corner is background.
            left, right = rng.uniform(0.35, 1.0, size=2)
            background = picture[:, :1, :1]
            picture = background + torch.linspace(left, right, picture.shape[2]) * (picture - background)
        if rng.random() < 0.5:
            dx, dy = (int(v) for v in rng.integers(-3, 4, size=2))
            picture = F.pad(picture, (3, 3, 3, 3), mode="replicate")[:, 3 + dy : 67 + dy, 3 + dx : 67 + dx]
        if rng.random() < 0.7:
            small = int(rng.integers(26, 64))
            picture = F.interpolate(picture[None], size=(small, small), mode="bilinear", antialias=True)
            picture = F.interpolate(picture, size=(64, 64), mode="bicubic")[0]
        if rng.random() < 0.5:
            grey = picture.mean(dim=0, keepdim=True)
            picture = grey + rng.uniform(0.6, 1.1) * (picture - grey)
        contrast, brightness = rng.uniform(0.85, 1.15), rng.uniform(-0.1, 0.1)
        picture = picture * contrast + brightness
        sigma = rng.uniform(0, 0.12) if rng.random() < 0.5 else 0.0
        if sigma:
            noise = torch.from_numpy(rng.standard_normal(picture.shape, dtype=np.float32))
            picture = picture + sigma * noise
        out.append(picture.clamp(-1, 1))
    return torch.stack(out)


def judge_accuracy(judge: Judge, *, seed: int = 0, count: int = 2000, paint: Painter = draw) -> dict[str, float]:
    """Accuracy on held-out renderings without augmentation: singles (top 1), pairs (both in the top 2), style, background."""
    rng = np.random.default_rng([seed, RECIPES["plain"].stream, 10**9])
    scenes = [random_scene(rng, pair_share=0.5) for _ in range(count)]
    opinion = judge.judge(picture_batch(scenes, rng, paint))
    truth = label(scenes)
    single = truth.objects.sum(1) == 1
    top1 = opinion.objects.argmax(1)
    top2 = torch.zeros_like(truth.objects).scatter(1, opinion.objects.topk(2).indices, 1.0)
    return {
        "single_top1": float(truth.objects[single].gather(1, top1[single, None]).mean()),
        "pair_both_in_top2": float(((top2 * truth.objects).sum(1) == 2)[~single].float().mean()),
        "style": float((opinion.style.argmax(1) == truth.style.argmax(1)).float().mean()),
        "background": float((opinion.background.argmax(1) == truth.background.argmax(1)).float().mean()),
        "pictures": float(count),
    }
