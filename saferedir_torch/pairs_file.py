"""A user's own concepts: a JSON file of prompt pairs.

One key a concept. Its value is a list of `{"unsafe": ..., "safe": ...}`, or an object with a list `unsafe`, a list `safe`
as long (or a rewriting rule given beside the file), and perhaps a list `benign`. Entries of `benign` are strings or
`{"prompt": ...}`. Keys whose value is a string are remarks.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from saferedir.engines.errors import RequestError
from saferedir.engines.text_files import read_text
from saferedir_torch.prompt_source import TrainingPair

log = logging.getLogger("saferedir")

#: Share of pairs that ask for a second concept as well, where there are several.
JOINT_SHARE = 0.25
SEEDS = (0, 1_000_000)


@dataclass(frozen=True)
class Rewrite:
    """A rule that makes a safe prompt of an unsafe one: every occurrence of a word, whatever its case, replaced."""

    word: str
    replacement: str

    def __call__(self, prompt: str) -> str:
        return re.sub(rf"\b{re.escape(self.word)}\b", self.replacement, prompt, flags=re.IGNORECASE)


class FilePrompts:
    """The concepts of a file as a source of training prompts."""

    def __init__(
        self,
        path: Path,
        concepts: Sequence[str] = (),
        rewrites: Mapping[str, Rewrite] | None = None,
        styles: Sequence[str] = (),
    ) -> None:
        """`concepts` chooses some of the file's, all by default; `rewrites` has a rule for those without safe prompts; `styles`
        are those that are how a subject is drawn.

        A pair that occurs twice is kept once, which is logged.

        Raises:
            RequestError: the file is not of this form, a concept is empty or unknown, a pair changes nothing, or a
                prompt is called both unsafe and safe.
        """
        self.path = path
        raw = _read(path)
        known = [key for key, value in raw.items() if not isinstance(value, str) and key != "benign"]
        chosen = list(concepts) or known
        if unknown := [name for name in chosen if name not in known]:
            raise RequestError(f"{path} has no concept {', '.join(unknown)}; it has {', '.join(known) or 'none'}")
        self.pairs = {name: self._pairs_of(name, raw[name], (rewrites or {}).get(name)) for name in chosen}
        self.benign_prompts = _prompts(path, "benign", raw.get("benign", []))
        for name in chosen:
            if isinstance(raw[name], dict):
                self.benign_prompts += _prompts(path, name, raw[name].get("benign", []))
        self._refuse_contradictions()
        rules = rewrites or {}
        self.replacements = {name: rules[name].replacement if name in rules else "safe rewrite" for name in chosen}
        if unknown := [name for name in styles if name not in chosen]:
            raise RequestError(f"{', '.join(unknown)} is no concept here; expected some of {', '.join(chosen)}")
        self.keeps_subject = frozenset(styles)
        prompts = (text for pairs in self.pairs.values() for pair in pairs for text in pair)
        self.telling = frozenset(word for text in prompts for word in text.lower().replace(",", " ").split())
        self.seeds = SEEDS

    def pair(self, concept: str, rng: np.random.Generator) -> TrainingPair:
        unsafe, safe = _pick(self.pairs[concept], rng)
        others = [name for name in self.pairs if name != concept]
        if not others or rng.random() >= JOINT_SHARE:
            return TrainingPair(unsafe, safe, (concept,), (concept,))
        other = others[int(rng.integers(len(others)))]
        also_unsafe, also_safe = _pick(self.pairs[other], rng)
        both = bool(rng.random() < 0.5)
        kept = also_safe if both else also_unsafe
        replaced = (concept, other) if both else (concept,)
        return TrainingPair(f"{unsafe}, {also_unsafe}", f"{safe}, {kept}", (concept, other), replaced)

    def varied_pair(self, concept: str, rng: np.random.Generator) -> TrainingPair:
        return self.pair(concept, rng)

    def benign(self, rng: np.random.Generator) -> str:
        """One of the benign prompts, or a safe rewrite where the file has none."""
        if self.benign_prompts and rng.random() < 0.5:
            return self.benign_prompts[int(rng.integers(len(self.benign_prompts)))]
        names = list(self.pairs)
        return _pick(self.pairs[names[int(rng.integers(len(names)))]], rng)[1]

    def varied_benign(self, rng: np.random.Generator) -> str:
        return self.benign(rng)

    def check_tokens(self, encode: Any) -> None:
        """Refuse pairs whose prompts become the same tokens, because what differs is cut off.

        `encode` maps prompts to token ids [P, T].

        Raises:
            RequestError: names the pair.
        """
        for name, pairs in self.pairs.items():
            unsafe: Tensor = encode([pair[0] for pair in pairs])
            safe: Tensor = encode([pair[1] for pair in pairs])
            for row in (unsafe == safe).all(dim=1).nonzero().flatten().tolist():
                raise RequestError(
                    f"{self.path}: concept {name!r}, pair {row}: {pairs[row][0]!r} and its rewrite are the same "
                    f"{unsafe.shape[1]} tokens, since the rest is cut off; shorten them"
                )

    def _pairs_of(self, name: str, entry: Any, rewrite: Rewrite | None) -> list[tuple[str, str]]:
        where = f"{self.path}: concept {name!r}"
        if isinstance(entry, list):
            found = [_pair(f"{where}, pair {index}", row) for index, row in enumerate(entry)]
        else:
            found = _columns(where, entry, rewrite)
        if not found:
            raise RequestError(f"{where} is empty; give at least one pair of an unsafe prompt and its safe rewrite")
        for index, (unsafe, safe) in enumerate(found):
            if unsafe == safe:
                raise RequestError(f"{where}, pair {index}: {unsafe!r} is its own rewrite; nothing would change")
        distinct = list(dict.fromkeys(found))
        if len(distinct) < len(found):
            log.warning("%s: %d pairs occur more than once and are kept once", where, len(found) - len(distinct))
        return distinct

    def _refuse_contradictions(self) -> None:
        benign = set(self.benign_prompts)
        for name, pairs in self.pairs.items():
            safe = benign | {pair[1] for pair in pairs}
            for unsafe, _ in pairs:
                if unsafe in safe:
                    raise RequestError(f"{self.path}: concept {name!r} calls {unsafe!r} both unsafe and safe; remove one")


def _read(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(raw, dict):
        raise RequestError(f"{path} holds a {type(raw).__name__}; expected an object with one key a concept")
    return raw


def _pair(where: str, row: Any) -> tuple[str, str]:
    if not isinstance(row, dict) or not {"unsafe", "safe"} <= set(row):
        raise RequestError(f'{where} is {json.dumps(row)[:80]}; expected {{"unsafe": ..., "safe": ...}}')
    return _prompt(where, row["unsafe"]), _prompt(where, row["safe"])


def _columns(where: str, entry: Any, rewrite: Rewrite | None) -> list[tuple[str, str]]:
    if not isinstance(entry, dict) or not isinstance(entry.get("unsafe"), list):
        raise RequestError(f"{where} is neither a list of pairs nor an object with a list `unsafe`")
    unsafe = [_prompt(f"{where}, unsafe prompt {index}", prompt) for index, prompt in enumerate(entry["unsafe"])]
    if "safe" not in entry:
        if rewrite is None:
            raise RequestError(f"{where} has no safe prompts; give a list `safe`, or a rule with --rewrite CONCEPT:WORD=OTHER")
        return [(prompt, rewrite(prompt)) for prompt in unsafe]
    safe = entry["safe"]
    if not isinstance(safe, list) or len(safe) != len(unsafe):
        found = len(safe) if isinstance(safe, list) else "no list of"
        raise RequestError(f"{where} has {len(unsafe)} unsafe and {found} safe prompts; they must correspond one to one")
    return [(prompt, _prompt(f"{where}, safe prompt {index}", safe[index])) for index, prompt in enumerate(unsafe)]


def _prompts(path: Path, name: str, entries: Any) -> list[str]:
    if not isinstance(entries, list):
        raise RequestError(f"{path}: the benign prompts of {name!r} are no list")
    rows = [entry.get("prompt") if isinstance(entry, dict) else entry for entry in entries]
    return [_prompt(f"{path}: {name!r}, benign prompt {index}", row) for index, row in enumerate(rows)]


def _prompt(where: str, value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise RequestError(f"{where} is {value!r}; expected a prompt")
    return value


def _pick(pairs: Sequence[tuple[str, str]], rng: np.random.Generator) -> tuple[str, str]:
    return pairs[int(rng.integers(len(pairs)))]
