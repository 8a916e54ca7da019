"""A contact sheet and a self-contained page: unprotected beside protected, the score of every step, the mask over the words.

The look and what draws a record (`page_assets/`) are those of the service's page and of the evaluation's report.
"""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from PIL import Image

from saferedir.runtime.outputs import png_bytes
from saferedir.runtime.record import SafetyRecord

#: What a page says that it was made by.
GENERATOR = '<meta name="generator" content="saferedir demo">'
SCALE = 3
GAP = 6


@dataclass(frozen=True)
class Comparison:
    """The same prompt and seed drawn without and with safety."""

    note: str
    unprotected: Image.Image
    protected: Image.Image
    record: SafetyRecord


def contact_sheet(comparisons: Sequence[Comparison]) -> Image.Image:
    """Unprotected pictures in the upper row, protected ones below."""
    width, height = comparisons[0].protected.size
    width, height = width * SCALE, height * SCALE
    sheet = Image.new("RGB", (len(comparisons) * (width + GAP) + GAP, 2 * (height + GAP) + GAP), "white")
    for column, item in enumerate(comparisons):
        for row, picture in enumerate((item.unprotected, item.protected)):
            place = (GAP + column * (width + GAP), GAP + row * (height + GAP))
            sheet.paste(picture.resize((width, height), Image.Resampling.LANCZOS), place)
    return sheet


@cache
def asset(name: str) -> str:
    """The text of a file of `page_assets/`."""
    return (files("saferedir.runtime") / "page_assets" / name).read_text(encoding="utf-8")


def comparison_page(title: str, comparisons: Sequence[Comparison], replacements: Mapping[str, str]) -> str:
    """One HTML document without outside references; `replacements` are by concept."""
    versions = comparisons[0].record.versions
    made_with = ", ".join(f"{html.escape(name)} {html.escape(value[:12])}" for name, value in versions.items())
    data = {"items": [_item(own) for own in comparisons], "replacements": dict(replacements)}
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">{GENERATOR}<meta name="viewport" content="width=device-width,initial-scale=1">
<title>{html.escape(title)}</title><style>{asset("page.css")}</style></head><body>
<h1>{html.escape(title)}</h1>
<p>Same prompt, same seed. The left picture was drawn <strong>unprotected</strong>, by the operator's explicit setting; the
right one with the safety in force. The curve is the detector's score over the denoising steps; a dot marks a step in which
it fired, the dashed line the threshold, shade a step of rest. The shade behind a word is the redirector's mask.</p>
<main class="cards" id="cards"></main>
<footer>{made_with}</footer>
<script type="application/json" id="data">{script_json(data)}</script>
<script>{asset("page.js")}</script>
<script>
const {{ items, replacements }} = JSON.parse(document.getElementById("data").textContent);
document.getElementById("cards").append(...items.map((item) => saferedir.comparison(item, replacements)));
</script>
</body></html>
"""


def script_json(value: Any) -> str:
    """JSON that no script element ends at."""
    return json.dumps(value).replace("</", "<\\/")


def _item(own: Comparison) -> dict[str, Any]:
    record = own.record
    identical = own.protected.tobytes() == own.unprotected.tobytes()
    return {
        "note": own.note,
        "unprotected": data_url(own.unprotected),
        "protected": data_url(own.protected),
        "record": record.to_dict(),
        "same": None if record.fired else "bit-identical" if identical else "differs",
    }


def data_url(image: Image.Image) -> str:
    """The picture, in place of an address."""
    return f"data:image/png;base64,{base64.b64encode(png_bytes(image)).decode()}"
