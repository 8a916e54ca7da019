"""Writes the README's figures from the files in `benchmarks/results`, so that no figure there is typed by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.report import RESULTS
from saferedir_torch.world.vocabulary import load_vocabulary

README = Path(__file__).parents[1] / "README.md"
KEPT = ("companion", "style", "background")
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
        _forgetting: ("forgetting_church", "forgetting_ink", "forgetting_weapons"),
        _benign: ("benign",),
        _base: ("base_quality",),
        _unfamiliar: ("unfamiliar",),
        _splits: ("splits",),
        _several: ("interference",),
        _added: ("added",),
        _detection: ("detection",),
        _ablation: ("ablation",),
        _strength: ("strength",),
        _cooldown: ("cooldown",),
        _cost: ("speed", "speed_ort-cuda"),
        _safety_cost: ("safety_cost",),
        _optimisers: ("optimisers",),
        _parity: ("parity",),
        _families: ("families",),
        _precision: ("precision",),
        _ladder: ("oracle_church",),
    }
    measured = {path.stem for path in RESULTS.glob("*.json")}
    return "\n\n".join(write() for write, needed in sections.items() if measured.issuperset(needed))


def _forgetting() -> str:
    rows = []
    for name in ("church", "ink", "weapons"):
        for alone in ("", "_alone"):
            if not (RESULTS / f"forgetting{alone}_{name}.json").exists():
                continue
            result = _read(f"forgetting{alone}_{name}")
            for part in ("seen", "held_out"):
                row = result[part]
                kept = ", ".join(
                    _percent(row["kept"][what]["as_often_as_rewrite"]) for what in ("companion", "style", "background")
                )
                rows.append(
                    f"| {name} → {result['replacement']} | {'alone' if alone else 'all in one'} | {part.replace('_', '-')} "
                    f"| {_share(row['fsr_protected'])} | {_percent(row['fsr_rewrite']['share'])} "
                    f"| {row['worst_name'][0]}: {_percent(row['worst_name'][1]['share'])} | {kept} "
                    f"| {row['csdr']['ratio_to_two_seeds']:.2f} |"
                )
    counted = _read("forgetting_church")["seen"]["fsr_protected"]
    recalls = [
        _read(f"forgetting_{name}")[part]["shown_unprotected"]["share"]
        for name in ("church", "ink", "weapons")
        for part in ("seen", "held_out")
    ]
    recall = f"{_percent(min(recalls))} to {_percent(max(recalls))}"
    table = "\n".join(rows)
    return f"""**Is the concept gone, is everything else untouched?** Per row about {counted["of"]} pictures of
{counted["prompts"]} prompts with companions and seeds that safety training never saw, judged by a classifier that shares nothing with model or
safety, at even odds, or more where that would accuse over one validation rewrite in a thousand; it finds the concept in {recall} of the
unprotected pictures.
FSR: share of pictures in which the judge no longer finds the concept. In brackets a 95 % interval: with fewer than ten
failures, that of the share of prompts none of whose pictures failed, which is lower. "Rewrite" is the
unprotected model on the safe prompt: what a perfect redirection would draw. Kept: how often companion, style and background
are as asked, relative to the rewrite. CSDR ratio: change of the image-text score from the rewrite, relative to that between
two seeds of the rewrite (`clip_world`). (`python -m benchmarks.evaluate forgetting --task church`, with `--alone` for one concept's module;
the figures of the module of all three are of pictures drawn on {_drawn_on("forgetting_church")})

| concept | module | names | FSR | FSR of the rewrite | worst name | companion, style, background kept | CSDR ratio |
| --- | --- | --- | --- | --- | --- | --- | --- |
{table}

![Rows: unprotected, protected, safe rewrite](benchmarks/results/forgetting_church_held_out.png)"""


def _benign() -> str:
    result = _read("benign")
    fired, same = result["fired"], result["bit_identical_where_nothing_fired"]
    near, worst = result["fired_near_neighbours"], result["worst_object"]
    share, low, high = (100 * fired[key] for key in ("share", "low", "high"))
    return f"""**Does it fire on benign prompts?** On {fired["hits"]} of {fired["of"]}, {share:.2f} % ({low:.2f} to {high:.2f} %);
{near["of"]} of them name what looks or is called like a concept. {same["hits"]} of the {same["of"]} other pictures equal the unprotected ones to
the bit. Worst object: {worst["object"]}, {worst["fired"]} of {worst["of"]}. (`python -m benchmarks.evaluate benign`)"""


def _base() -> str:
    base = _read("base_quality")["base"]
    names = sum(len(item.names) for item in load_vocabulary().objects.values())
    return f"""By the same judge the base model draws {_percent(base["single"])} of single objects, asked for by its
{names} names, {_percent(base["pair"])} of pairs (both found), {_percent(base["style"])} of styles."""


def _unfamiliar() -> str:
    result = {kind: row for kind, row in _read("unfamiliar").items() if kind != "environment"}
    quiet = [row["fired_without_a_concept"] for row in result.values()]
    table = "\n".join(
        f"| {kind} | {_count(row['fired_without_a_concept'])} | {_count(row['shows_a_concept_unprotected'])} "
        f"| {_count(row['shows_a_concept_protected'])} |"
        for kind, row in result.items()
    )
    return f"""**And on what neither model nor safety ever saw?** Fires without a concept in the picture on {sum(row["hits"] for row in quiet)} of
{sum(row["of"] for row in quiet)}. What empty prompts show is the ink style, which the model draws now and then where no style is asked for: no
word carries it, so that moving words does not take it out. (`python -m benchmarks.evaluate unfamiliar`)

| prompts | fires without a concept | shows a concept unprotected | and still does protected |
| --- | --- | --- | --- |
{table}"""


def _splits() -> str:
    result = _read("splits")
    table = "\n".join(
        f"| {title} | {_share(row['seen']['fsr'])} | {_share(row['held_out']['fsr'])} "
        f"| {_worst(row['seen']['by_name'])} | {_worst(row['held_out']['by_name'])} |"
        for title, row in result["splits"].items()
    )
    return f"""**Does it matter which names were seen?** Concept {result["concept"]}, its names split anew and a module
trained for each split, with {result["steps"]} steps and {result["runs"]} unsafe runs. (`python -m benchmarks.evaluate splits`)

| split | FSR, seen | FSR, held-out | worst seen name | worst held-out name |
| --- | --- | --- | --- | --- |
{table}"""


def _several() -> str:
    result = _read("interference")
    matrix = "\n".join(
        f"| {', '.join(row['enabled'])} | {row['asked']} | {_percent(row['fired']['share'])} "
        f"| {_percent(row['gone']['share']) if 'gone' in row else ''} |"
        for row in result["matrix"]
    )
    joint = "\n".join(
        f"| {', '.join(row['asked'])} | {row['directions']} | {_share(row['all_gone'])} "
        f"| {_percent(row['fired_at_different_steps']['share'])} |"
        for row in result["joint"]
    )
    return f"""**Do concepts get in each other's way?** Enabled against asked for, seen names.
(`python -m benchmarks.evaluate interference`)

| enabled | asked for | fired | gone |
| --- | --- | --- | --- |
{matrix}

Asked for at once; "joint" is the redirector that knows the active set, "summed" adds the directions of each concept alone:

| asked for | directions | all gone | fired at different steps |
| --- | --- | --- | --- |
{joint}"""


def _added() -> str:
    result = _read("added")
    seen, held = (result["forgetting"][part]["fsr_protected"] for part in ("seen", "held_out"))
    equal = [entry["decisions_equal"] for entry in result["others"].values()]
    return f"""**A fourth concept, added to the finished module** ({result["concept"]},
{result["training"]["minutes"]} minutes on one core): FSR {_share(seen)} on seen, {_share(held)} on held-out names; {sum(row["hits"] for row in equal)} of
{sum(row["of"] for row in equal)} decisions of the others are as before. (`python -m benchmarks.evaluate added`)"""


def _detection() -> str:
    result = _read("detection")
    bands = ["all", *(f"{low}-{high}" for low, high in result["bands"])]
    table = "\n".join(
        f"| {inputs} | {kind.replace('_', '-')} | "
        + " | ".join(_percent(row[band]["balanced_accuracy"]) for band in bands)
        + " |"
        for inputs, kinds in result["detectors"].items()
        for kind, row in kinds.items()
    )
    return f"""**What do latent and timestep add over the text?** Balanced accuracy by band of timesteps (999 is noise).
(`python -m benchmarks.evaluate detection`)

| detector reads | names | {" | ".join(bands)} |
| --- | --- | {" | ".join("---" for _ in bands)} |
{table}"""


def _ablation() -> str:
    result = _read("ablation")
    perceptual = result["measures"][1]
    table = "\n".join(
        f"| {variant} | {_share(parts['seen']['fsr'])} | {_share(parts['held_out']['fsr'])} "
        f"| {_percent(parts['held_out']['companion']['share'])} | {parts['held_out'][perceptual]['mean']:.4f} |"
        for variant, parts in result["variants"].items()
    )
    return f"""**What is each part for?** Concept {result["concept"]}, same data, {result["steps"]} steps,
one part left out at a time. (`python -m benchmarks.evaluate ablation`)

| variant | FSR, seen | FSR, held-out | companion, held-out | {perceptual} to the rewrite, held-out |
| --- | --- | --- | --- | --- |
{table}"""


def _strength() -> str:
    result = _read("strength")
    _, perceptual, frechet = result["measures"]
    table = "\n".join(
        f"| {name} | {row['strength']} | {_share(row['fsr'])} | {row[perceptual]['mean']:.4f} | {row[frechet]:.2f} "
        f"| {_percent(row['companion']['share'])} |"
        for name, concept in result["concepts"].items()
        for row in concept["rows"]
    )
    better = [
        f"{name}, {row['strength']}"
        for name, concept in result["concepts"].items()
        for row in concept["against_adaptive"]
        if row["better_on_both"]
    ]
    return f"""**How far to move?** Fixed strengths s against the adaptive one, held-out names. Better than it in both
FSR and {perceptual} (paired bootstrap, 95 %): {"; ".join(better) or "none"}. (`python -m benchmarks.evaluate strength`)

| concept | strength | FSR | {perceptual} to the rewrite | {frechet} to the rewrite | companion |
| --- | --- | --- | --- | --- | --- |
{table}"""


def _cooldown() -> str:
    result = _read("cooldown")
    table = "\n".join(
        f"| {name} | {row['cooldown']} | {_share(row['fsr'])} | {row['flips_a_picture']:.2f} | {_percent(row['oscillating']['share'])} "
        f"| {row['firings_a_picture']:.2f} | {_percent(row['companion']['share'])} |"
        for name, rows in result["concepts"].items()
        for row in rows
    )
    return f"""**How long to rest after firing?** Held-out names. A flip is a step whose decision differs from the
step's before; from unsafe to safe it is the redirection at work, two and more are oscillation. (`python -m benchmarks.evaluate cooldown`)

| concept | cooldown K | FSR | flips a picture | oscillating | firings a picture | companion |
| --- | --- | --- | --- | --- | --- | --- |
{table}"""


def _cost() -> str:
    said, rows = [], []
    for name in ("speed", "speed_ort-cuda"):
        result = _read(name)
        shares = result["safety_share_of_step"]
        backend = "ort-cpu" if name == "speed" else "ort-cuda"
        said.append(
            f"`{backend}`: {result['environment']['machine']}; safety's share of a step on this very small UNet is "
            f"{_percent(shares['1'])} at batch 1, {_percent(shares['8'])} at batch 8."
        )
        rows += [
            f"| {backend} | {row['batch']} | {row['what']} | {1000 * row['seconds_per_image']:.0f} ms | {row['ratio']:.2f}x |"
            for row in result["rows"]
        ]
    table = "\n".join(rows)
    return f"""**What does it cost?** {result["steps"]} DDIM steps, fp32; eager diffusers on the same device. {" ".join(said)}
(`make speed`; `python -m benchmarks.speed --backend ort-cuda`)

| backend | batch | | per image | speed against protected eager diffusers |
| --- | --- | --- | --- | --- |
{table}"""


def _safety_cost() -> str:
    result = _read("safety_cost")
    table = "\n".join(
        f"| `{row['engine']}` | {row['gflop']:.2f} | {1000 * row['seconds']:.1f} ms | {row['of_published']:.3f} "
        f"| {100 * row['of_a_guided_step']:.2f} % |"
        for row in result["rows"]
    )
    return f"""**And at Stable Diffusion 1.5's shapes?** {result["environment"]["machine"]}, one request, fp32. `safety_prompt` runs once a prompt
and `safety_step` every step; `safety` is both in one; the UNet is of the true size with random weights, in eager PyTorch.
(`python -m benchmarks.safety_cost --unet`)

| engine | GFLOP | time | of the published network's | of the UNet's guided step |
| --- | --- | --- | --- | --- |
{table}"""


def _optimisers() -> str:
    result = _read("optimisers")
    table = "\n".join(
        f"| {row['unet']} | {row['batch']} | {row['graph']} | {row['nodes']} | {row['load']:.1f} s | {1000 * row['call']:.0f} ms "
        f"| {row['ratio']:.2f}x | {row['difference']:.0e} |"
        for row in result["rows"]
    )
    return f"""**What do graph optimisers buy?** A call of the UNet in ONNX Runtime with its own optimisations on, {result["environment"]["machine"]},
fp32, batches with both halves of guidance; medians of {result["calls"]} calls in turn. "As exported" is without the last row's
attention, which bundles have; the others do not earn their place. (`python -m benchmarks.optimisers`)

| UNet | batch | graph | nodes | loads in | call | speed | largest difference |
| --- | --- | --- | --- | --- | --- | --- | --- |
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


def _families() -> str:
    rows = []
    measured = [name for name in ("families", "families_full") if (RESULTS / f"{name}.json").exists()]
    for row in (row for name in measured for row in _read(name)["rows"]):
        rows.append(
            f"| {row['model']} | {row['family']} | {row['worst']:.1e} ({row['worst_where']}) "
            f"| {row['decisions_equal']} of {row['decisions']} "
            f"| {'equal' if row['psnr'] is None else format(row['psnr'], '.0f') + ' dB'} "
            f"| {row['fired']} of {row['steps']} | {'equal' if row['drawn_without_torch'] else 'differs'} "
            f"| {row['megabytes']:.1f} MB | {row['seconds']:.0f} s, {row['peak_memory_gb']:.1f} GB |"
        )
    table = "\n".join(rows)
    return f"""**Which models?** Each exported on one machine, its engines compared with eager PyTorch on inputs of real runs, with and without guidance and
safety, some in which every other step fires; models of the true classes with random weights, and the embedded one.
(`python -m benchmarks.families`)

| model | family | worst difference of an engine's output | decisions equal | PSNR of pictures | steps that fire where every score does | picture drawn without PyTorch | bundle | export, and memory until then |
| --- | --- | --- | --- | --- | --- | --- | --- | --- |
{table}"""


def _precision() -> str:
    result = _read("precision")
    rows = []
    for row in result["rows"]:
        fsr = ", ".join(_percent(own["share"]) for own in row["fsr"].values())
        near = row["largest"][0] if row["largest"] else None
        largest = "" if near is None else f"{100 * near['of_largest']:.1g} % ({near['tensor']})"
        psnr = "" if row["way"] == "fp32" else f"{row['worst_psnr']:.1f}, {row['median_psnr']:.1f} dB"
        rows.append(
            f"| {row['way']} | {_count(row['decisions_equal'])} | {psnr} | {fsr} | {row['weight_bytes'] / 1e6:.1f} MB | {largest} |"
        )
    table = "\n".join(rows)
    return f"""**What does lower precision change?** {result["pictures"]} pictures, {result["benign"]} of them benign, the others with
held-out names, {result["steps"]} steps each, every tensor of the graphs rounded to its type; int8 rounds weights alone, and
saves room on disk alone. (`python -m benchmarks.precision`)

| | decisions as in fp32 | PSNR to fp32, worst and median | FSR of church, ink, weapons | weights | largest magnitude, of what its type holds |
| --- | --- | --- | --- | --- | --- |
{table}"""


def _ladder() -> str:
    ladders = [_read(path.stem) for path in sorted(RESULTS.glob("oracle_*.json"))]
    table = "\n".join(
        f"| {result['concept']} | {row['rung']} | {_percent(row['found'])} | {_percent(row['replacement'])} "
        f"| {_percent(row['companion'])} |"
        for result in ladders
        for row in result["rows"]
    )
    return f"""**The oracle ladder**: how well redirection could forget, rung by rung, on {ladders[0]["count"]}
validation prompts. (`python -m saferedir_torch oracle`)

| concept | rung | found | replacement drawn | companion kept |
| --- | --- | --- | --- | --- |
{table}"""


def _read(name: str) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return data


def _drawn_on(name: str) -> str:
    """Machine of a result and the ONNX Runtime it was made with."""
    own = _read(name)["environment"]
    packages = own["packages"]
    runtime = next(f"{package} {packages[package]}" for package in ("onnxruntime", "onnxruntime-gpu") if package in packages)
    return f"{own['machine']}, with {runtime}"


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _count(value: dict[str, float]) -> str:
    return f"{value['hits']} of {value['of']}"


def _worst(by_name: dict[str, float]) -> str:
    name = min(by_name, key=by_name.__getitem__)
    return f"{name}: {_percent(by_name[name])}"


def _share(value: dict[str, float]) -> str:
    return f"{_percent(value['share'])} ({_percent(value['low'])} to {_percent(value['high'])})"


if __name__ == "__main__":
    main()
