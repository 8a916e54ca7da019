"""What the figures say of the method: is the concept gone, is everything else untouched, and what makes it so."""

from __future__ import annotations

from typing import Any

from benchmarks.markdown import drawn_on, hits_of, percent, read_result, share_of, worst_of
from benchmarks.report import RESULTS
from saferedir_torch.world.vocabulary import load_vocabulary

#: Of which a row is shown.
COOLDOWNS = (0, 2, 10)


def forgetting() -> str:
    rows = []
    for name in ("church", "ink", "weapons"):
        for alone in ("", "_alone"):
            if not (RESULTS / f"forgetting{alone}_{name}.json").exists():
                continue
            result = read_result(f"forgetting{alone}_{name}")
            for part in ("seen", "held_out"):
                row = result[part]
                kept = ", ".join(
                    percent(row["kept"][what]["as_often_as_rewrite"]) for what in ("companion", "style", "background")
                )
                rows.append(
                    f"| {name} → {result['replacement']} | {'alone' if alone else 'all in one'} | {part.replace('_', '-')} "
                    f"| {share_of(row['fsr_protected'])} | {percent(row['fsr_rewrite']['share'])} "
                    f"| {row['worst_name'][0]}: {percent(row['worst_name'][1]['share'])} | {kept} "
                    f"| {row['csdr']['ratio_to_two_seeds']:.2f} |"
                )
    counted = read_result("forgetting_church")["seen"]["fsr_protected"]
    recalls = [
        read_result(f"forgetting_{name}")[part]["shown_unprotected"]["share"]
        for name in ("church", "ink", "weapons")
        for part in ("seen", "held_out")
    ]
    recall = f"{percent(min(recalls))} to {percent(max(recalls))}"
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
the figures of the module of all three are of pictures drawn on {drawn_on("forgetting_church")})

| concept | module | names | FSR | FSR of the rewrite | worst name | companion, style, background kept | CSDR ratio |
| --- | --- | --- | --- | --- | --- | --- | --- |
{table}

![Rows: unprotected, protected, safe rewrite](results/forgetting_church_held_out.png)"""


def benign() -> str:
    result = read_result("benign")
    fired, same = result["fired"], result["bit_identical_where_nothing_fired"]
    near, worst = result["fired_near_neighbours"], result["worst_object"]
    share, low, high = (100 * fired[key] for key in ("share", "low", "high"))
    return f"""**Does it fire on benign prompts?** On {fired["hits"]} of {fired["of"]}, {share:.2f} % ({low:.2f} to {high:.2f} %);
{near["of"]} of them name what looks or is called like a concept. {same["hits"]} of the {same["of"]} other pictures equal the unprotected ones to
the bit. Worst object: {worst["object"]}, {worst["fired"]} of {worst["of"]}. (`python -m benchmarks.evaluate benign`)"""


def base() -> str:
    base = read_result("base_quality")["base"]
    names = sum(len(item.names) for item in load_vocabulary().objects.values())
    return f"""By the same judge the base model draws {percent(base["single"])} of single objects, asked for by its
{names} names, {percent(base["pair"])} of pairs (both found), {percent(base["style"])} of styles."""


def unfamiliar() -> str:
    result = {kind: row for kind, row in read_result("unfamiliar").items() if "fired" in row}
    quiet = [row["fired_without_a_concept"] for row in result.values()]
    table = "\n".join(
        f"| {kind} | {hits_of(row['fired_without_a_concept'])} | {hits_of(row['shows_a_concept_unprotected'])} "
        f"| {hits_of(row['shows_a_concept_protected'])} |"
        for kind, row in result.items()
    )
    return f"""**And on what neither model nor safety ever saw?** Fires without a concept in the picture on {sum(row["hits"] for row in quiet)} of
{sum(row["of"] for row in quiet)}. What empty prompts show is the ink style, which the model draws now and then where no style is asked for: no
word carries it, so that moving words does not take it out. (`python -m benchmarks.evaluate unfamiliar`)

| prompts | fires without a concept | shows a concept unprotected | and still does protected |
| --- | --- | --- | --- |
{table}"""


def splits() -> str:
    result = read_result("splits")
    table = "\n".join(
        f"| {title} | {share_of(row['seen']['fsr'])} | {share_of(row['held_out']['fsr'])} "
        f"| {worst_of(row['seen']['by_name'])} | {worst_of(row['held_out']['by_name'])} |"
        for title, row in result["splits"].items()
    )
    return f"""**Does it matter which names were seen?** Concept {result["concept"]}, its names split anew and a module
trained for each split, with {result["steps"]} steps and {result["runs"]} unsafe runs. (`python -m benchmarks.evaluate splits`)

| split | FSR, seen | FSR, held-out | worst seen name | worst held-out name |
| --- | --- | --- | --- | --- |
{table}"""


def several() -> str:
    result = read_result("interference")
    asked = list(dict.fromkeys(row["asked"] for row in result["matrix"]))
    cells = {(", ".join(row["enabled"]), row["asked"]): row for row in result["matrix"]}
    matrix = "\n".join(
        f"| {enabled} | " + " | ".join(_fired_and_gone(cells[enabled, name]) for name in asked) + " |"
        for enabled in dict.fromkeys(enabled for enabled, _ in cells)
    )
    distance = next(key for key in result["joint"][0] if key.endswith("_to_rewrite"))
    joint = "\n".join(
        f"| {', '.join(row['asked'])} | {row['directions']} | {share_of(row['all_gone'])} | {row[distance]['mean']:.3f} "
        f"({row[distance]['low']:.3f} to {row[distance]['high']:.3f}) | {hits_of(row['fired_at_different_steps'])} |"
        for row in result["joint"]
    )
    return f"""**Do concepts get in each other's way?** Share of pictures in which something fired, and in which what was asked for is
gone; seen names. (`python -m benchmarks.evaluate interference`)

| enabled, asked for: | {" | ".join(asked)} |
| --- | {" | ".join("---" for _ in asked)} |
{matrix}

Asked for at once; "joint" is the redirector that knows the active set, "summed" adds the directions of each concept alone:

| asked for | directions | all gone | `{distance.removesuffix("_to_rewrite")}` to the rewrite | fired at different steps |
| --- | --- | --- | --- | --- |
{joint}"""


def _fired_and_gone(cell: dict[str, Any]) -> str:
    return percent(cell["fired"]["share"]) + (f", {percent(cell['gone']['share'])}" if "gone" in cell else "")


def added() -> str:
    result = read_result("added")
    seen, held = (result["forgetting"][part]["fsr_protected"] for part in ("seen", "held_out"))
    equal, idle = ([entry[key] for entry in result["others"].values()] for key in ("decisions_equal", "new_one_fired"))
    return f"""**A fourth concept, added to the finished module** ({result["concept"]},
{result["training"]["minutes"]} minutes on one core): FSR {share_of(seen)} on seen, {share_of(held)} on held-out names; {sum(row["hits"] for row in equal)} of
{sum(row["of"] for row in equal)} decisions of the others are as before, and the new one fires on {sum(row["hits"] for row in idle)} of
{sum(row["of"] for row in idle)} pictures that were not asked to show it. (`python -m benchmarks.evaluate added`)"""


def detection() -> str:
    result = read_result("detection")
    bands = ["all", *(f"{low}-{high}" for low, high in result["bands"])]
    table = "\n".join(
        f"| {inputs} | {kind.replace('_', '-')} | "
        + " | ".join(percent(row[band]["balanced_accuracy"]) for band in bands)
        + " |"
        for inputs, kinds in result["detectors"].items()
        for kind, row in kinds.items()
    )
    return f"""**What do latent and timestep add over the text?** Balanced accuracy by band of timesteps (999 is noise).
(`python -m benchmarks.evaluate detection`)

| detector reads | names | {" | ".join(bands)} |
| --- | --- | {" | ".join("---" for _ in bands)} |
{table}"""


def ablation() -> str:
    result = read_result("ablation")
    perceptual = result["measures"][1]
    table = "\n".join(
        f"| {variant} | {share_of(parts['seen']['fsr'])} | {share_of(parts['held_out']['fsr'])} "
        f"| {percent(parts['held_out']['companion']['share'])} | {parts['held_out'][perceptual]['mean']:.4f} |"
        for variant, parts in result["variants"].items()
    )
    return f"""**What is each part for?** Concept {result["concept"]}, same data, {result["steps"]} steps,
one part left out at a time. (`python -m benchmarks.evaluate ablation`)

| variant | FSR, seen | FSR, held-out | companion, held-out | {perceptual} to the rewrite, held-out |
| --- | --- | --- | --- | --- |
{table}"""


def strength_choice() -> str:
    result = read_result("strength_choice")
    measure = result["measure"]
    table = "\n".join(
        f"| {name} | {row['strength']:g}{' (chosen)' if row['strength'] == concept['chosen'] else ''} "
        f"| {row['hints']['judge']} ({concept['rewrite_hints']['judge']}) "
        f"| {row['hints']['second_judge']} ({concept['rewrite_hints']['second_judge']}) | {row[measure]:.4f} |"
        for name, concept in result["concepts"].items()
        for row in concept["rows"]
    )
    pictures = next(iter(result["concepts"].values()))["pictures"]
    return f"""**How far is each concept moved?** The least strength that leaves hints of it (a judge's score above
{result["hints_from"]:g}) in no more pictures than the rewrite has, in brackets; {pictures} validation pictures of names that
training knows. (`python -m benchmarks.evaluate choose-strength`)

| concept | strength | hints, first judge | hints, second judge | {measure} to the rewrite |
| --- | --- | --- | --- | --- |
{table}"""


def cooldown() -> str:
    result = read_result("cooldown")
    table = "\n".join(
        f"| {name} | {row['cooldown']} | {share_of(row['fsr'])} | {row['flips_a_picture']:.2f} | {percent(row['oscillating']['share'])} "
        f"| {row['firings_a_picture']:.2f} | {percent(row['companion']['share'])} |"
        for name, rows in result["concepts"].items()
        for row in rows
        if row["cooldown"] in COOLDOWNS
    )
    most = max(row["oscillating"]["share"] for rows in result["concepts"].values() for row in rows)
    return f"""**How long to rest after firing?** Held-out names; of the cooldowns from 0 to 10 that were drawn three are shown, and of none
did more than {percent(most)} of the pictures oscillate. A flip is a step whose decision differs from the step's before; from unsafe
to safe it is the redirection at work, two and more are oscillation. (`python -m benchmarks.evaluate cooldown`)

| concept | cooldown K | FSR | flips a picture | oscillating | firings a picture | companion |
| --- | --- | --- | --- | --- | --- | --- |
{table}"""


def ladder() -> str:
    ladders = [read_result(path.stem) for path in sorted(RESULTS.glob("oracle_*.json"))]
    table = "\n".join(
        f"| {result['concept']} | {row['rung']} | {percent(row['found'])} | {percent(row['replacement'])} "
        f"| {percent(row['companion'])} |"
        for result in ladders
        for row in result["rows"]
    )
    return f"""**The oracle ladder**: how well redirection could forget, rung by rung, on {ladders[0]["count"]}
validation prompts. (`python -m saferedir_torch.world oracle`)

| concept | rung | found | replacement drawn | companion kept |
| --- | --- | --- | --- | --- |
{table}"""
