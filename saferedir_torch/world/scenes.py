"""A scene (one or two objects, a style, a background) and its 64x64 picture."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt
from PIL import Image

from saferedir_torch.world.icons import load_sprites
from saferedir_torch.world.vocabulary import load_vocabulary

PICTURE_SIZE = 64
SINGLE_SIZES = range(48, 57)
PAIR_SIZES = range(28, 32)
PAIR_SHARE = 0.4
JITTER = 3


@dataclass(frozen=True)
class Scene:
    """What a picture shows: no, one or two objects. Of two the first stands on the left."""

    objects: tuple[str, ...]
    style: str
    background: str


#: Draws a scene's picture, [64, 64, 3] uint8.
Painter = Callable[[Scene, np.random.Generator], npt.NDArray[np.uint8]]


def random_scene(rng: np.random.Generator, pair_share: float = PAIR_SHARE) -> Scene:
    """A scene drawn uniformly over objects, styles and backgrounds; the two objects of a pair differ."""
    vocabulary = load_vocabulary()
    count = 2 if rng.random() < pair_share else 1
    keys = vocabulary.object_keys
    objects = tuple(keys[i] for i in rng.choice(len(keys), size=count, replace=False))
    styles, backgrounds = vocabulary.style_keys, vocabulary.background_keys
    return Scene(objects, styles[rng.integers(len(styles))], backgrounds[rng.integers(len(backgrounds))])


def draw(scene: Scene, rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    """The picture of `scene`, [64, 64, 3] uint8, sizes and places jittered by `rng`."""
    colour = load_vocabulary().backgrounds[scene.background]
    canvas = np.empty((PICTURE_SIZE, PICTURE_SIZE, 3), np.float32)
    canvas[:] = colour
    if len(scene.objects) < 2:
        centres = [PICTURE_SIZE // 2] * len(scene.objects)
        sizes = SINGLE_SIZES
        jitter = JITTER
    else:
        centres = [PICTURE_SIZE // 4, 3 * PICTURE_SIZE // 4]
        sizes = PAIR_SIZES
        jitter = 1
    for key, centre in zip(scene.objects, centres, strict=True):
        size = int(rng.integers(sizes.start, sizes.stop))
        dx = int(rng.integers(-jitter, jitter + 1))
        dy = int(rng.integers(-JITTER, JITTER + 1))
        left = int(np.clip(centre - size // 2 + dx, 0, PICTURE_SIZE - size))
        top = int(np.clip(PICTURE_SIZE // 2 - size // 2 + dy, 0, PICTURE_SIZE - size))
        colours, alpha = _scaled_sprite(key, scene.style, size)
        patch = canvas[top : top + size, left : left + size]
        patch += alpha * (colours - patch)
    return canvas.round().astype(np.uint8)


def scattered(scene: Scene, rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    """The scene in other pictures than the world's own, [64, 64, 3] uint8: its objects one above the other or anywhere, over a
    striped gradient from the background's colour to another one, under light of another colour."""
    vocabulary = load_vocabulary()
    first = np.asarray(vocabulary.backgrounds[scene.background], np.float32)
    second = np.asarray(
        vocabulary.backgrounds[vocabulary.background_keys[rng.integers(len(vocabulary.backgrounds))]], np.float32
    )
    fade = np.linspace(0, 0.6, PICTURE_SIZE, dtype=np.float32)[:, None, None]
    stripes = 12 * np.sign(np.sin(np.arange(PICTURE_SIZE, dtype=np.float32) * rng.uniform(0.4, 1.2)))[None, :, None]
    canvas = np.broadcast_to(first + fade * (second - first) + stripes, (PICTURE_SIZE, PICTURE_SIZE, 3)).copy()
    for place, key in enumerate(scene.objects):
        size = int(rng.integers(26, 31) if len(scene.objects) > 1 else rng.integers(34, 49))
        top = place * PICTURE_SIZE // 2 if len(scene.objects) > 1 else int(rng.integers(0, PICTURE_SIZE - size + 1))
        left = int(rng.integers(0, PICTURE_SIZE - size + 1))
        colours, alpha = _scaled_sprite(key, scene.style, size)
        patch = canvas[top : top + size, left : left + size]
        patch += alpha * (colours - patch)
    light = rng.uniform(0.75, 1.1, size=3).astype(np.float32)
    return (canvas * light).clip(0, 255).round().astype(np.uint8)


@cache
def _scaled_sprite(key: str, style: str, size: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    sprite = load_sprites()[key, style].resize((size, size), Image.Resampling.LANCZOS)
    rgba = np.asarray(sprite, np.float32)
    return rgba[..., :3].copy(), rgba[..., 3:] / np.float32(255)
