"""A request: its options, checked once, before anything is computed."""

from __future__ import annotations

import math
import operator
import secrets
from collections.abc import Mapping, Sequence, Set, Sized
from dataclasses import dataclass
from typing import Any, SupportsIndex

import numpy as np
import numpy.typing as npt

from saferedir.engines.errors import RequestError
from saferedir.engines.manifest import ModelInfo
from saferedir.runtime.noise import LOW_BITS, generator_seed
from saferedir.runtime.tokenizer import check_prompt

Embeds = npt.NDArray[np.float32]
#: One integer of any type, one for each picture, or None for a random one.
Seeds = SupportsIndex | Sequence[SupportsIndex] | npt.NDArray[np.integer[Any]] | None
#: Pictures of one call, which are all held in memory.
MOST_PICTURES = 1_000


@dataclass(frozen=True, kw_only=True)
class ImageRequest:
    """One picture to draw: a prompt or an embedding, and what goes with it."""

    #: None where `prompt_embeds` is given.
    prompt: str | None
    #: [T, D], in place of the prompt; protected alike.
    prompt_embeds: Embeds | None
    negative_prompt: str | None
    negative_prompt_embeds: Embeds | None
    #: As torch's generator uses it: 0 to 2^32-1.
    seed: int

    @property
    def has_negative(self) -> bool:
        """Whether something is to be drawn away from."""
        return bool(self.negative_prompt) or self.negative_prompt_embeds is not None


def build_requests(
    model: ModelInfo,
    prompts: str | Sequence[str] | None,
    *,
    prompt_embeds: npt.ArrayLike | None,
    negative_prompt: str | Sequence[str] | None,
    negative_prompt_embeds: npt.ArrayLike | None,
    seed: Seeds,
    num_images_per_prompt: int,
) -> list[ImageRequest]:
    """One request a picture, prompts repeated `num_images_per_prompt` times in a row.

    An integer seed belongs to the first picture and counts up; a sequence gives each picture its own; None draws the first.

    Raises:
        RequestError: names the field, what it was, and what is expected.
    """
    if (prompts is None) == (prompt_embeds is None):
        raise RequestError("give either prompts or prompt_embeds, not both")
    if as_integer("num_images_per_prompt", num_images_per_prompt) < 1:
        raise RequestError(f"num_images_per_prompt is {num_images_per_prompt}; expected 1 or more")
    texts: list[str | None]
    embeds: list[Embeds | None]
    if prompts is not None:
        check_count(1 if isinstance(prompts, str) else _length("prompts", prompts), num_images_per_prompt)
        texts = [check_prompt(text) for text in ([prompts] if isinstance(prompts, str) else prompts)]
        embeds = [None] * len(texts)
    else:
        embeds = list(_embeddings("prompt_embeds", prompt_embeds, model))
        texts = [None] * len(embeds)
    if not texts:
        raise RequestError("prompts is empty; give at least one prompt")
    check_count(len(texts), num_images_per_prompt)
    negatives = _per_prompt("negative_prompt", negative_prompt, len(texts))
    negative_embeds: list[Embeds | None] = [None] * len(texts)
    if negative_prompt_embeds is not None:
        if negative_prompt is not None:
            raise RequestError("give either negative_prompt or negative_prompt_embeds, not both")
        given = _embeddings("negative_prompt_embeds", negative_prompt_embeds, model)
        if len(given) not in (1, len(texts)):
            raise RequestError(f"negative_prompt_embeds holds {len(given)} embeddings for {len(texts)} prompts")
        negative_embeds = list(given) if len(given) == len(texts) else [given[0]] * len(texts)
    count = len(texts) * num_images_per_prompt
    seeds = _seeds(seed, count)
    return [
        ImageRequest(
            prompt=texts[index // num_images_per_prompt],
            prompt_embeds=embeds[index // num_images_per_prompt],
            negative_prompt=negatives[index // num_images_per_prompt],
            negative_prompt_embeds=negative_embeds[index // num_images_per_prompt],
            seed=seeds[index],
        )
        for index in range(count)
    ]


def _length(field: str, value: Any) -> int:
    if isinstance(value, Mapping | Set | bytes) or not isinstance(value, Sized):
        raise RequestError(f"{field} is {type(value).__name__}; expected text, or a list of texts")
    return len(value)


def check_count(prompts: int, num_images_per_prompt: int) -> None:
    """Raise `RequestError` where more pictures are asked for than one call draws."""
    if (count := prompts * num_images_per_prompt) > MOST_PICTURES:
        raise RequestError(
            f"{count} pictures are asked for; expected at most {MOST_PICTURES} a call, since all are kept in memory"
        )


def latent_size(model: ModelInfo, height: int | None, width: int | None) -> tuple[int, int]:
    """Height and width of the latent of a picture of `height` x `width` pixels; None is the model's own.

    Raises:
        RequestError: the bundle has no engines for it; the message says for which it has, and how to have it.
    """
    scale = model.vae_scale_factor
    tall = model.latent_height * scale if height is None else as_integer("height", height)
    wide = model.latent_width * scale if width is None else as_integer("width", width)
    if (tall / scale, wide / scale) not in model.sizes:
        can = (
            f"export it with --size {tall}x{wide}"
            if tall > 0 < wide and tall % scale == wide % scale == 0
            else (f"sides are multiples of {scale}")
        )
        raise RequestError(f"size is {tall}x{wide}; this bundle draws {', '.join(model.picture_sizes)}; {can}")
    return tall // scale, wide // scale


def check_guidance(guidance_scale: float) -> float:
    """`guidance_scale` as a float; 0 up to 1 mean unguided.

    Raises:
        RequestError: not a finite number, or negative (which would draw the negative prompt).
    """
    value = _as_float(guidance_scale)
    if not math.isfinite(value) or value < 0:
        raise RequestError(f"guidance_scale is {guidance_scale!r}; expected a finite number of 0 or more")
    return value


def check_rescale(model: ModelInfo, guidance_rescale: float, guidance_scale: float) -> float:
    """`guidance_rescale` as a float.

    Raises:
        RequestError: not a number from 0 to 1, or above 0 where no two halves are guided.
    """
    value = _as_float(guidance_rescale)
    if not 0 <= value <= 1:
        raise RequestError(f"guidance_rescale is {guidance_rescale!r}; expected a number from 0 to 1")
    if value > 0 and (guidance_scale <= 1 or model.told_guidance):
        why = "a model that is told its guidance" if model.told_guidance else f"guidance_scale {guidance_scale:g}"
        raise RequestError(f"guidance_rescale is {value:g}, but with {why} there is nothing to rescale; expected 0")
    return value


def _as_float(value: Any) -> float:
    """`value` as a float, NaN where it is no number."""
    try:
        return math.nan if isinstance(value, bool | str | bytes) else float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def as_integer(field: str, value: Any) -> int:
    """`value` as an int, of whatever integer type it is.

    Raises:
        RequestError: it is no integer.
    """
    try:
        if isinstance(value, bool | np.bool_):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise RequestError(f"{field} is {value!r}; expected an integer") from None


def _seeds(seed: Seeds, count: int) -> list[int]:
    if isinstance(seed, Sequence | np.ndarray) and not isinstance(seed, str | bytes):
        seeds = [generator_seed(as_integer("seed", value)) for value in seed]
        if len(seeds) != count:
            raise RequestError(f"seed holds {len(seeds)} values for {count} pictures")
        return seeds
    first = secrets.randbelow(LOW_BITS + 1) if seed is None else generator_seed(as_integer("seed", seed))
    return [(first + index) & LOW_BITS for index in range(count)]


def _per_prompt(field: str, value: str | Sequence[str] | None, count: int) -> list[str | None]:
    if value is None:
        return [None] * count
    if isinstance(value, str):
        return [check_prompt(value, field)] * count
    if _length(field, value) != count:
        raise RequestError(f"{field} holds {len(value)} texts for {count} prompts")
    return [check_prompt(text, field) for text in value]


def _embeddings(field: str, value: Any, model: ModelInfo) -> Embeds:
    try:
        array: Embeds = np.asarray(value, np.float32)
    except (TypeError, ValueError):
        raise RequestError(f"{field} is no array of numbers") from None
    expected = (model.prompt_tokens, model.prompt_width)
    if array.ndim == 2:
        array = array[None]
    if array.ndim != 3 or array.shape[1:] != expected or not len(array):
        raise RequestError(f"{field} has shape {np.shape(value)}; expected [pictures, {expected[0]}, {expected[1]}]")
    if not np.isfinite(array).all():
        raise RequestError(f"{field} holds NaN or infinity")
    return array
