"""Builds the sprite atlases from four openly licensed icon packs, fetched by name with `npm pack`.

The atlases are checked in beside this file (one PNG a style, one 96 px cell an object, in vocabulary order), so npm is
needed only to rebuild them. Licences: see NOTICE.
"""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import tarfile
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageFilter

from saferedir_torch.world.vocabulary import load_vocabulary

ATLAS_DIR = Path(__file__).with_name("sprites")
CELL = 96
COLUMNS = 12
MARGIN = 4  # room for the sticker's white outline

#: style -> (npm package, version). Which look each gives is decided in `_stylise`.
ICON_PACKS = {
    "glossy": ("@iconify-json/noto", "1.2.9"),
    "ink": ("@iconify-json/fluent-emoji-high-contrast", "1.2.6"),
    "sepia": ("@iconify-json/fluent-emoji-flat", "1.2.6"),
    "sticker": ("@iconify-json/twemoji", "1.2.5"),
}


def build_atlases(out_dir: Path = ATLAS_DIR) -> None:
    """Write one RGBA atlas a style to `out_dir`. Needs `npm` and the package `resvg_py`.

    Raises:
        FileNotFoundError: npm is not installed.
        KeyError: a pack has no icon of that name.
    """
    if shutil.which("npm") is None:
        raise FileNotFoundError("npm is needed to fetch the icon packs; install Node.js, or use the atlases shipped here")
    out_dir.mkdir(parents=True, exist_ok=True)
    objects = list(load_vocabulary().objects.values())
    rows = -(-len(objects) // COLUMNS)
    for style, (package, version) in ICON_PACKS.items():
        pack = _fetch_pack(package, version)
        atlas = Image.new("RGBA", (COLUMNS * CELL, rows * CELL))
        for index, item in enumerate(objects):
            sprite = _stylise(_rasterise(pack, item.icon), style)
            atlas.paste(sprite, (index % COLUMNS * CELL, index // COLUMNS * CELL))
        atlas.save(out_dir / f"{style}.png", optimize=True)


@cache
def load_sprites() -> dict[tuple[str, str], Image.Image]:
    """(object key, style key) -> RGBA sprite, 96x96."""
    vocabulary = load_vocabulary()
    sprites = {}
    for style in vocabulary.style_keys:
        atlas = Image.open(ATLAS_DIR / f"{style}.png").convert("RGBA")
        for index, key in enumerate(vocabulary.object_keys):
            left, top = index % COLUMNS * CELL, index // COLUMNS * CELL
            sprites[key, style] = atlas.crop((left, top, left + CELL, top + CELL))
    return sprites


def _fetch_pack(package: str, version: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["npm", "pack", "--silent", f"{package}@{version}"], cwd=folder, check=True, stdout=subprocess.DEVNULL)
        archive = next(Path(folder).glob("*.tgz"))
        with tarfile.open(archive) as tar:
            member = tar.extractfile("package/icons.json")
            if member is None:
                raise KeyError(f"{package}@{version} holds no icons.json")
            pack: dict[str, Any] = json.load(member)
    return pack


def _rasterise(pack: dict[str, Any], name: str) -> Image.Image:
    import resvg_py

    while name in pack.get("aliases", {}):
        name = pack["aliases"][name]["parent"]
    icon = pack["icons"][name]
    width = icon.get("width", pack.get("width", 16))
    height = icon.get("height", pack.get("height", 16))
    body = icon["body"].replace("currentColor", "#000")
    size = CELL - 2 * MARGIN
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="0 0 {width} {height}" width="{size}" height="{size}">{body}</svg>'
    )
    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size))
    sprite = Image.new("RGBA", (CELL, CELL))
    sprite.paste(Image.open(io.BytesIO(png)).convert("RGBA"), (MARGIN, MARGIN))
    return sprite


def _stylise(sprite: Image.Image, style: str) -> Image.Image:
    if style == "sepia":
        rgba = np.asarray(sprite).astype(np.float32)
        luminance = (rgba[..., :3] @ np.array([0.299, 0.587, 0.114], np.float32))[..., None] / 255
        dark, light = np.array([58, 32, 12], np.float32), np.array([238, 206, 160], np.float32)
        rgba[..., :3] = dark + (light - dark) * luminance
        return Image.fromarray(rgba.round().astype(np.uint8), "RGBA")
    if style == "sticker":
        outline = sprite.getchannel("A").filter(ImageFilter.MaxFilter(9))
        backing = Image.new("RGBA", sprite.size, (255, 255, 255, 0))
        backing.putalpha(outline)
        return Image.alpha_composite(backing, sprite)
    return sprite
