"""What the safety of a bundle does to prompts of your own: what fires, what a judge still finds, and what stays to the bit."""

from __future__ import annotations

import importlib
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from saferedir.engines.errors import RequestError
from saferedir.engines.whole_file import write_bytes
from saferedir.runtime.outputs import output_folder, png_bytes, refuse_strange
from saferedir.runtime.page import GENERATOR, Comparison, comparison_page, contact_sheet
from saferedir.runtime.pipeline import Pipeline
from saferedir.runtime.policy import SafetyPolicy
from saferedir.runtime.ticket import StepCallback

#: Pictures -> for each whether it shows what is forbidden.
Judge = Callable[[list[Image.Image]], Sequence[bool]]
#: Pictures of each kind on page and sheet.
SHOWN = 12
SHEET, PAGE, RESULT = "contact-sheet.png", "index.html", "evaluation.json"
#: Of the standard normal distribution, for intervals of 95 %.
QUANTILE = 1.959964


@dataclass(frozen=True)
class Asked:
    """Prompts that ask for what is forbidden, ones that do not, and how all are drawn."""

    unsafe: Sequence[str]
    benign: Sequence[str]
    #: Pictures a prompt.
    count: int = 1
    seed: int = 0
    steps: int = 25
    guidance: float = 5.0
    scheduler: str | None = None


def evaluate(
    pipeline: Pipeline, asked: Asked, out: Path, judge: Judge | None = None, *, on_step: StepCallback | None = None
) -> dict[str, Any]:
    """Draw all prompts without and with safety, write `evaluation.json`, `index.html` and `contact-sheet.png` to `out`, and
    return what the first holds. Intervals are Wilson's, of 95 %.

    Raises:
        RequestError: there are no prompts, or one cannot be drawn.
        OutputError: `out` cannot be written, or holds files of these names that are not an evaluation's.
    """
    if not asked.unsafe and not asked.benign:
        raise RequestError("no prompts; expected some that ask for what is forbidden (--unsafe), some that do not (--benign)")
    with output_folder(out) as folder:
        refuse_strange(folder, (SHEET, PAGE, RESULT), PAGE, GENERATOR)
        drawn = {
            kind: _drawn(pipeline, prompts, asked, on_step)
            for kind, prompts in (("unsafe", asked.unsafe), ("benign", asked.benign)) if prompts
        }  # fmt: skip
        result = {
            "bundle": pipeline.bundle.digest,
            "settings": {"steps": asked.steps, "guidance": asked.guidance, "scheduler": asked.scheduler, "seed": asked.seed},
            **{kind: _figures(own, judge if kind == "unsafe" else None) for kind, own in drawn.items()},
        }
        comparisons = [comparison for own in drawn.values() for comparison in own.comparisons[:SHOWN]]
        replacements = {concept.name: concept.replacement for concept in pipeline.manifest.safety.concepts}
        write_bytes(folder / SHEET, png_bytes(contact_sheet(comparisons)))
        title = f"{pipeline.manifest.name} under safety"
        write_bytes(folder / PAGE, comparison_page(title, comparisons, replacements).encode())
        write_bytes(folder / RESULT, json.dumps(result, indent=1).encode())
    return result


@dataclass(frozen=True)
class _Drawn:
    comparisons: list[Comparison]
    #: Of a picture, without safety and with it.
    seconds: tuple[float, float]


def _drawn(pipeline: Pipeline, prompts: Sequence[str], asked: Asked, on_step: StepCallback | None) -> _Drawn:
    plain = Pipeline(pipeline.bundle, pipeline.backend, SafetyPolicy(unprotected=True))
    settings: dict[str, Any] = {
        "num_images_per_prompt": asked.count, "seed": asked.seed, "num_inference_steps": asked.steps,
        "guidance_scale": asked.guidance, "scheduler": asked.scheduler,
    }  # fmt: skip
    started = time.perf_counter()
    without = plain(prompts, **settings, on_step=on_step)
    between = time.perf_counter()
    safe = pipeline(prompts, **settings, on_step=on_step)
    ended = time.perf_counter()
    comparisons = [Comparison("", *both) for both in zip(without.images, safe.images, safe.records, strict=True)]
    count = len(comparisons)
    return _Drawn(comparisons, ((between - started) / count, (ended - between) / count))


def _figures(drawn: _Drawn, judge: Judge | None) -> dict[str, Any]:
    records = [own.record for own in drawn.comparisons]
    quiet = [own for own in drawn.comparisons if not own.record.fired]
    concepts = list(records[0].looked_for)
    same = sum(np.array_equal(np.asarray(own.unprotected), np.asarray(own.protected)) for own in quiet)
    figures: dict[str, Any] = {
        "pictures": len(records),
        "fired": share(sum(record.fired for record in records), len(records)),
        "fired_by_concept": {
            name: sum(any(name in step.fired for step in record.steps) for record in records) for name in concepts
        },
        "bit_identical_where_nothing_fired": share(same, len(quiet)),
        "seconds_a_picture": {"unprotected": drawn.seconds[0], "protected": drawn.seconds[1]},
    }
    if judge is not None:
        before, after = (
            [bool(found) for found in judge([getattr(own, side) for own in drawn.comparisons])]
            for side in ("unprotected", "protected")
        )
        gone = sum(shown and not still for shown, still in zip(before, after, strict=True))
        figures |= {"shown_without_safety": share(sum(before), len(before)), "gone_with_it": share(gone, sum(before))}
    return figures


def share(hits: int, of: int) -> dict[str, float | None]:
    """A share and Wilson's 95 % interval of it (1927); None where there is nothing to count."""
    if not of:
        return {"hits": hits, "of": of, "share": None, "low": None, "high": None}
    z, p = QUANTILE, hits / of
    middle, wide = p + z * z / (2 * of), z * math.sqrt(p * (1 - p) / of + z * z / (4 * of * of))
    low, high = ((middle + side) / (1 + z * z / of) for side in (-wide, wide))
    return {"hits": hits, "of": of, "share": p, "low": max(low, 0.0), "high": min(high, 1.0)}


def load_judge(name: str) -> Judge:
    """The function `module:function`, which takes pictures and says of each whether it shows what is forbidden.

    Raises:
        RequestError: there is no such function.
    """
    module, _, function = name.partition(":")
    try:
        found: Judge = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise RequestError(f"judge {name!r} cannot be imported: {error}; expected module:function") from error
    return found
