"""The evaluation as one page and one JSON: every table of which there are results, on the page with plots and contact
sheets."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import jinja2
import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from benchmarks.limits import limits
from benchmarks.report import save

REPORT = "report"
TEMPLATE = Path(__file__).with_name("report.html.jinja")
Json = dict[str, Any]


def write_report(results: Path) -> Path:
    """Read the JSON files of `results`, and write `report.json` and `report.html` beside them; the page is returned.

    The JSON holds every table under the name of its file, with the command, versions and date that it was measured with.
    """
    found = {path.stem: json.loads(path.read_text()) for path in sorted(results.glob("*.json")) if path.stem != REPORT}
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATE.parent), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    environment.filters["share"] = share_text
    environment.filters["percent"] = lambda value: f"{100 * value:.1f} %"
    environment.filters["mean"] = mean_text
    page = environment.get_template(TEMPLATE.name).render(
        results=found,
        forgetting={name: result for name, result in found.items() if name.startswith("forgetting_")},
        plots=_plots(found),
        limits=limits(found),
        sheets={path.stem: _inline_png(path.read_bytes()) for path in sorted(results.glob("*.png"))},
    )
    save(REPORT, {"tables": found}, results)
    out = results / f"{REPORT}.html"
    partial = out.with_suffix(".partial")
    partial.write_text(page, encoding="utf-8")
    partial.replace(out)
    return out


def share_text(value: Json) -> str:
    """`99.8 % (99.4 to 100.0)`."""
    return f"{100 * value['share']:.2f} % ({100 * value['low']:.1f} to {100 * value['high']:.1f})"


def mean_text(value: Json) -> str:
    """`0.0123 (0.0110 to 0.0140)`."""
    return f"{value['mean']:.4f} ({value['low']:.4f} to {value['high']:.4f})"


def _plots(found: dict[str, Json]) -> dict[str, str]:
    made = {"words": _scores(found["words"])} if "words" in found else {}
    seen = {name: _seen_of_attacks(result) for name, result in found.items() if _families_seen(result)}
    return made | seen


def _scores(result: Json) -> str:
    rows = -(-len(result["prompts"]) // 4)
    figure, grid = pyplot.subplots(rows, 4, figsize=(14, 2.6 * rows), layout="constrained", squeeze=False)
    for axes, entry in zip(grid.flatten(), result["prompts"], strict=False):
        for name, scores in entry["scores"].items():
            line = axes.plot(scores, label=name)[0]
            fired = [step for step, names in enumerate(entry["fired"]) if name in names]
            axes.plot(fired, [scores[step] for step in fired], "o", color=line.get_color())
        axes.set(ylim=(-0.05, 1.05), title=entry["prompt"][:44])
        axes.title.set_fontsize(8)
    grid[0][0].legend(fontsize=8)
    return _inline(figure)


def _families_seen(result: Json) -> dict[str, Json]:
    """Families of an attack table of which it was looked at by which step they are detected."""
    families = result.get("families", {})
    return {family: row["detected"] for family, row in families.items() if isinstance(row, dict) and row.get("detected")}


def _seen_of_attacks(result: Json) -> str:
    lines = _families_seen(result) | ({"together": result["together"]} if result.get("together") else {})
    figure, axes = pyplot.subplots(figsize=(6.4, 3.8), layout="constrained")
    for family, bands in lines.items():
        heights = [100 * row["balanced_accuracy"] for row in bands.values()]
        own = {"color": "black", "linewidth": 2.5} if family == "together" else {}
        axes.plot(list(bands), heights, "o-", label=family, **own)
    axes.axhline(95, color="tab:grey", linestyle=":")
    axes.set(xlabel="by a share of the steps", ylabel="balanced accuracy, %")
    axes.legend(fontsize=7)
    axes.grid(alpha=0.3)
    return _inline(figure)


def _inline(figure: Any) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    pyplot.close(figure)
    return _inline_png(buffer.getvalue())


def _inline_png(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()
