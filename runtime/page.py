"""A contact sheet and a self-contained page: unprotected beside protected, the score of every step, the mask over the words."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass

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


def comparison_page(title: str, comparisons: Sequence[Comparison], thresholds: dict[str, float]) -> str:
    """One HTML document without outside references."""
    cards = "\n".join(_card(item, thresholds) for item in comparisons)
    versions = comparisons[0].record.versions
    engine = ", ".join(f"{html.escape(k)} {html.escape(v[:12])}" for k, v in versions.items())
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">{GENERATOR}<meta name="viewport" content="width=device-width,initial-scale=1">
<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body>
<h1>{html.escape(title)}</h1>
<p>Same prompt, same seed. The left picture was drawn <strong>unprotected</strong>, by the operator's explicit setting; the
right one with the safety in force. The curve is the detector's score over the denoising steps; a dot marks a step in which
it fired, the dashed line the threshold. The shade behind a word is the redirector's mask.</p>
<main>
{cards}
</main>
<footer>{engine}</footer>
</body></html>
"""


def _card(item: Comparison, thresholds: dict[str, float]) -> str:
    record = item.record
    verdict = "fired" if record.fired else "nothing fired"
    same = (
        "" if record.fired else (" · bit-identical" if item.protected.tobytes() == item.unprotected.tobytes() else " · differs")
    )
    return f"""<article class="{"fired" if record.fired else "quiet"}">
<h2>{html.escape(record.prompt or "(embedding)")}</h2>
<p class="note">{html.escape(item.note)} · seed {record.seed} · <b>{verdict}</b>{same}</p>
<div class="pair"><figure>{_picture(item.unprotected)}<figcaption>unprotected</figcaption></figure>
<figure>{_picture(item.protected)}<figcaption>protected</figcaption></figure></div>
{"".join(_curve(record, concept, threshold) for concept, threshold in thresholds.items())}
<p class="words">{_words(record)}</p>
</article>"""


def _picture(image: Image.Image) -> str:
    data = base64.b64encode(png_bytes(image)).decode()
    return f'<img alt="" width="{image.width * SCALE}" height="{image.height * SCALE}" src="data:image/png;base64,{data}">'


def _curve(record: SafetyRecord, concept: str, threshold: float) -> str:
    width, height = 384, 64
    steps = len(record.steps)
    if not steps:
        return ""
    points = [
        (8 + (width - 16) * index / max(1, steps - 1), height - 6 - (height - 12) * step.score[concept])
        for index, step in enumerate(record.steps)
    ]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    level = height - 6 - (height - 12) * threshold
    dots = "".join(
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5"/>'
        for (x, y), step in zip(points, record.steps, strict=True)
        if concept in step.fired
    )
    return (
        f'<svg role="img" aria-label="score of {html.escape(concept)} per step" viewBox="0 0 {width} {height}">'
        f'<line x1="0" x2="{width}" y1="{level:.1f}" y2="{level:.1f}"/><polyline points="{line}"/>{dots}'
        f'<text x="{width - 4}" y="12">{html.escape(concept)}</text></svg>'
    )


def _words(record: SafetyRecord) -> str:
    if not record.token_mask:
        return ""
    mask = [max(values) for values in zip(*record.token_mask.values(), strict=True)]
    spans = []
    for token, weight in zip(record.tokens, mask, strict=False):
        text = html.escape(token.replace("</w>", ""))
        spans.append(f'<span style="background:rgba(214,84,32,{weight:.2f})" title="{weight:.2f}">{text}</span>')
    return " ".join(spans)


_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:1320px;padding:0 1rem;color:#222;background:#fafafa}
main{display:grid;grid-template-columns:repeat(auto-fill,minmax(410px,1fr));gap:1rem}
article{background:#fff;border:1px solid #ddd;border-radius:8px;padding:1rem;border-top:4px solid #7a9}
article.fired{border-top-color:#d65420}h2{font-size:1rem;margin:0}.note{margin:.2rem 0 .6rem;color:#666}
.pair{display:flex;gap:.5rem}figure{margin:0}figcaption{color:#666;font-size:.8rem;text-align:center}
img{image-rendering:auto;border-radius:4px;max-width:100%;height:auto}svg{width:100%;margin-top:.5rem}
polyline{fill:none;stroke:#357;stroke-width:2}line{stroke:#999;stroke-dasharray:4 3}circle{fill:#d65420}
text{font-size:10px;text-anchor:end;fill:#666}.words span{padding:.1rem .25rem;border-radius:3px}
footer{color:#888;font-size:.75rem;margin-top:2rem;overflow-wrap:anywhere}
"""
