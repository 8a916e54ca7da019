"""Which names, object pairs and seeds safety training may see, and which are for testing only.

The split is drawn once, before anything is trained, and kept in `split.json`; `train` takes it as an argument.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from saferedir.engines.errors import RequestError
from saferedir_torch.world.vocabulary import load_vocabulary

SPLIT_FILE = Path(__file__).with_name("split.json")
CONCEPT_NAMES = 8  # from this many names on, half are held out
HELD_OUT_COMPANIONS = 0.25

#: Half-open ranges of picture seeds.
SEEDS = {"train": (0, 1_000_000), "validation": (1_000_000, 2_000_000), "test": (2_000_000, 3_000_000)}


@dataclass(frozen=True)
class Split:
    """`names` and `held_out_names` map objects, styles and categories to phrases; companions are object keys.

    A pair of a concept's object with a held-out companion is for testing only. Seeds are half-open ranges.
    """

    names: dict[str, list[str]]
    held_out_names: dict[str, list[str]]
    companions: list[str]
    held_out_companions: list[str]
    seeds: dict[str, tuple[int, int]]


def draw_split(seed: int) -> Split:
    """A split of the vocabulary: half of the names of every concept (at least eight names) held out, and the last
    name of every other object that has three or more; a quarter of the companions held out. The first name is seen."""
    vocabulary = load_vocabulary()
    rng = np.random.default_rng([seed, 9])
    everything = {o.key: o.names for o in vocabulary.objects.values()} | vocabulary.styles | vocabulary.categories
    names, held_out = {}, {}
    for key, phrases in everything.items():
        if len(phrases) >= CONCEPT_NAMES:
            others = [phrases[1:][i] for i in rng.permutation(len(phrases) - 1)]
            keep = len(phrases) // 2 - 1
            names[key], held_out[key] = [phrases[0], *others[:keep]], others[keep:]
        else:
            cut = len(phrases) - 1 if len(phrases) >= 3 else len(phrases)
            names[key], held_out[key] = list(phrases[:cut]), list(phrases[cut:])
    plain = [o.key for o in vocabulary.objects.values() if len(o.names) < CONCEPT_NAMES]
    order = [plain[i] for i in rng.permutation(len(plain))]
    cut = round(len(order) * HELD_OUT_COMPANIONS)
    return Split(names, held_out, sorted(order[cut:]), sorted(order[:cut]), dict(SEEDS))


def save_split(split: Split, path: Path = SPLIT_FILE) -> None:
    path.write_text(json.dumps(asdict(split), indent=1) + "\n")


def load_split(path: Path = SPLIT_FILE) -> Split:
    """The split in `path`.

    Raises:
        RequestError: the file is missing, is not a split, or names an unknown object.
    """
    try:
        raw = json.loads(path.read_text())
        split = Split(
            names=raw["names"],
            held_out_names=raw["held_out_names"],
            companions=raw["companions"],
            held_out_companions=raw["held_out_companions"],
            seeds={k: (int(v[0]), int(v[1])) for k, v in raw["seeds"].items()},
        )
    except (OSError, json.JSONDecodeError, KeyError, TypeError, IndexError) as error:
        raise RequestError(
            f"{path} is not a split file ({error}); write one with `python -m saferedir_torch.world split`"
        ) from error
    unknown = [key for key in split.companions + split.held_out_companions if key not in load_vocabulary().objects]
    if unknown:
        raise RequestError(f"{path} names objects that the vocabulary does not have: {', '.join(unknown)}")
    return split
