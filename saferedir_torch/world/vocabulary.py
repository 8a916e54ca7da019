"""What the world holds: objects, categories, styles and backgrounds, and every name taught for them."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

VOCABULARY_FILE = Path(__file__).with_name("vocabulary.toml")


@dataclass(frozen=True)
class WorldObject:
    """One drawable object: `icon` names it in the icon sets, `names` are the phrases that ask for it."""

    key: str
    icon: str
    names: tuple[str, ...]
    category: str | None


@dataclass(frozen=True)
class Vocabulary:
    """Everything emoji-diffusion can draw, in a fixed order (that order is the judge's label order)."""

    objects: dict[str, WorldObject]
    categories: dict[str, tuple[str, ...]]
    styles: dict[str, tuple[str, ...]]
    backgrounds: dict[str, tuple[int, int, int]]

    @property
    def object_keys(self) -> list[str]:
        return list(self.objects)

    @property
    def style_keys(self) -> list[str]:
        return list(self.styles)

    @property
    def background_keys(self) -> list[str]:
        return list(self.backgrounds)

    def members(self, category: str) -> list[str]:
        """Keys of the objects that belong to `category`."""
        return [o.key for o in self.objects.values() if o.category == category]


@cache
def load_vocabulary() -> Vocabulary:
    """The vocabulary of `vocabulary.toml`."""
    raw = tomllib.loads(VOCABULARY_FILE.read_text())
    objects = {
        key: WorldObject(key, entry["icon"], tuple(entry["names"]), entry.get("category"))
        for key, entry in raw["objects"].items()
    }
    return Vocabulary(
        objects=objects,
        categories={k: tuple(v) for k, v in raw["categories"].items()},
        styles={k: tuple(v) for k, v in raw["styles"].items()},
        backgrounds={k: (v[0], v[1], v[2]) for k, v in raw["backgrounds"].items()},
    )
