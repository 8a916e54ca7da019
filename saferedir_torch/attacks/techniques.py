"""Techniques by name, as the `eval-unlearn` package has them: a class with `generate(prompts, seed)`, built with options."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import entry_points
from typing import Any, Protocol, cast

import numpy as np
from PIL import Image
from rich.progress import track

from saferedir.engines.errors import RequestError
from saferedir_torch.attacks.suite import Draw, Pixels

#: Of entry points that are techniques.
GROUP = "eval_unlearn.techniques"


class Technique(Protocol):
    """Anything that draws prompts, with or without something that keeps it from drawing a concept."""

    def generate(self, prompts: Sequence[str], seed: int | None = None, **options: Any) -> list[Image.Image]:
        """A picture a prompt, or an embedding where `options` bring `prompt_embeds`."""
        ...


def load_technique(name: str, options: Mapping[str, Any]) -> Technique:
    """The technique called `name` among the installed ones, or of a class `module:Class`, built with `options`.

    Raises:
        RequestError: there is none, or it refuses the options.
    """
    made = _class_called(name)
    try:
        technique: Technique = made(**options)
    except Exception as error:  # whatever a foreign class raises
        raise RequestError(f"technique {name!r} cannot be built with {dict(options)}: {error}") from error
    if not callable(getattr(technique, "generate", None)):
        raise RequestError(f"technique {name!r} has no method `generate`")
    return technique


def _class_called(name: str) -> Callable[..., Any]:
    module, colon, attribute = name.partition(":")
    try:
        if colon:
            return cast(Callable[..., Any], getattr(importlib.import_module(module), attribute))
        installed = {own.name: own for own in entry_points(group=GROUP)}
        if name in installed:
            return cast(Callable[..., Any], installed[name].load())
    except (ImportError, AttributeError) as error:
        raise RequestError(f"technique {name!r} cannot be imported: {error}") from error
    raise RequestError(f"no technique {name!r}; installed: {', '.join(sorted(installed))}, or name a class as module:Class")


def drawing_with(technique: Technique) -> Draw:
    """Draws one picture at a time, since techniques differ in what a seed means to a batch."""

    def draw(prompts: Sequence[str], seeds: Sequence[int], title: str) -> Pixels:
        pictures = []
        for prompt, seed in track(list(zip(prompts, seeds, strict=True)), description=title):
            pictures.append(picture_of(technique, technique.generate([prompt], seed=seed)))
        return np.stack(pictures)

    return draw


def picture_of(technique: Technique, made: Sequence[Any]) -> Pixels:
    """The only picture, [H, W, 3], of what `technique` made of one prompt.

    Raises:
        RequestError: it made something else.
    """
    if len(made) != 1 or not isinstance(made[0], Image.Image):
        raise RequestError(f"{type(technique).__name__}.generate gave {made!r} for one prompt; expected one picture")
    return np.asarray(made[0].convert("RGB"), np.uint8)
