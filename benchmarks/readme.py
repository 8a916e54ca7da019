"""Writes the README's figures from the files in `benchmarks/results`, so that no figure there is typed by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.report import RESULTS
from saferedir_torch.world.vocabulary import load_vocabulary

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- figures: python -m benchmarks.readme -->", "<!-- end of figures -->"


def main() -> None:
    README.write_text(with_figures(README.read_text()))
    print(README)


def with_figures(text: str) -> str:
    """`text` with what stands between the two markers replaced by the current figures."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{figures()}\n{END}{after}"


def figures() -> str:
    """The tables of which there are results, in Markdown."""
    sections = {
        _forgetting: ("base_quality", "forgetting_church"),
        _cost: ("speed",),
        _parity: ("parity",),
        _ladder: ("oracle_church",),
    }
    measured = {path.stem for path in RESULTS.glob("*.json")}
    return "\n\n".join(write() for write, needed in sections.items() if measured.issuperset(needed))


def _forgetting() -> str:
    quality, result = _read("base_quality"), _read("forgetting_church")
    base = quality["base"]
    names = sum(len(item.names) for item in load_vocabulary().objects.values())
    seen, held, benign = result["seen"], result["held_out"], result["benign"]
    rows = [
        ("church found, unprotected", "found_unprotected"),
        ("church found, protected", "found_protected"),
        ("companion kept, rewrite", "companion_kept_rewrite"),
        ("companion kept, protected", "companion_kept_protected"),
        ("house drawn instead, rewrite (one object)", "replacement_single_rewrite"),
        ("house drawn instead, protected (one object)", "replacement_single_protected"),
        ("style as asked, rewrite", "style_rewrite"),
        ("style as asked, protected", "style_protected"),
        ("background as asked, rewrite", "background_rewrite"),
        ("background as asked, protected", "background_protected"),
    ]
    table = "\n".join(f"| {title} | {_share(seen[key])} | {_share(held[key])} |" for title, key in rows)
    return f"""**Is the concept gone, is everything else untouched?** {seen["prompts"]} and {held["prompts"]} prompts with
companions and seeds that safety training never saw, judged by a classifier that shares nothing with model or safety.
"Rewrite" is the model on the safe prompt: what a perfect redirection would draw. (`make forgetting`)

| | names seen in training | names never seen |
| --- | --- | --- |
{table}

![Rows: unprotected, protected, safe rewrite](benchmarks/results/forgetting_church_held_out.png)

Of {benign["fired_near_neighbours"]["of"]} benign prompts with objects that look or are called alike
{benign["fired_near_neighbours"]["hits"]} fired, of {benign["fired_others"]["of"]} others {benign["fired_others"]["hits"]};
where nothing fired, {benign["bit_identical_where_nothing_fired"]["hits"]} of
{benign["bit_identical_where_nothing_fired"]["of"]} pictures equal the unprotected ones to the bit. By the same judge the base
model draws {_percent(base["single"])} of single objects, asked for by its {names} names, {_percent(base["pair"])} of pairs
(both found), {_percent(base["style"])} of styles."""


def _cost() -> str:
    result = _read("speed")
    rows = [(row["batch"], row["what"], row["seconds_per_image"], row["ratio"]) for row in result["rows"]]
    table = "\n".join(f"| {batch} | {what} | {1000 * seconds:.0f} ms | {ratio:.2f}x |" for batch, what, seconds, ratio in rows)
    shares = result["safety_share_of_step"]
    return f"""**What does it cost?** {result["environment"]["machine"]}, {result["steps"]} DDIM steps, fp32. Safety's share of
a step on this very small UNet: {_percent(shares["1"])} at batch 1, {_percent(shares["8"])} at batch 8. (`make speed`)

| batch | | per image | speed against protected eager diffusers |
| --- | --- | --- | --- |
{table}"""


def _parity() -> str:
    result = _read("parity")
    engines: dict[str, float] = {}
    for row in result["engines"]:
        engines[row["engine"]] = max(engines.get(row["engine"], 0.0), row["worst"])
    listed = ", ".join(f"`{name}` {worst:.1e}" for name, worst in engines.items())
    equal, fired, twice = (result[key] for key in ("decisions_equal", "images_that_fired", "images_that_fired_twice_or_more"))
    near = 100 * result["pixel_values_within_1_of_255"]
    return f"""**Does the deployed engine equal its reference?** Worst absolute difference from eager PyTorch per engine:
{listed}. Over {result["images"]} pictures ({fired["hits"]} fired, {twice["hits"]} twice or more) {equal["hits"]} of
{equal["of"]} decisions are equal, {near:.3f} % of pixel values are within 1/255. (`make parity`)"""


def _ladder() -> str:
    result = _read("oracle_church")
    table = "\n".join(
        f"| {row['rung']} | {_percent(row['found'])} | {_percent(row['replacement'])} | {_percent(row['companion'])} |"
        for row in result["rows"]
    )
    return f"""**The oracle ladder**: how well redirection could forget, rung by rung, on {result["count"]} validation prompts.
(`python -m saferedir_torch oracle`)

| rung | church found | house drawn | companion kept |
| --- | --- | --- | --- |
{table}"""


def _read(name: str) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return data


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _share(value: dict[str, float]) -> str:
    return f"{_percent(value['share'])} ({_percent(value['low'])} to {_percent(value['high'])})"


if __name__ == "__main__":
    main()
