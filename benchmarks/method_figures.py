"""What the figures say of the method: is the concept gone, is everything else untouched, and what makes it so."""

from __future__ import annotations

from typing import Any

from benchmarks.markdown import drawn_on, hits_of, percent, read_result, refused, share_of
from benchmarks.report import RESULTS
from saferedir_torch.world.vocabulary import load_vocabulary


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
                    f"| {row['csdr']['ratio_to_two_seeds']:.2f} | {_by_picture(row)} |"
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
two seeds of the rewrite (`clip_world`). By the picture: FSR, and companions kept relative to the rewrite, of the same safety where
it does not hear the words. (`python -m benchmarks.evaluate forgetting --task church`, with `--alone` for one concept's module;
the figures of the module of all three are of pictures drawn on {drawn_on("forgetting_church")})

| concept | module | names | FSR | FSR of the rewrite | worst name | companion, style, background kept | CSDR ratio | by the picture |
| --- | --- | --- | --- | --- | --- | --- | --- | --- |
{table}

![Rows: unprotected, protected, safe rewrite](results/forgetting_church_held_out.png)"""


def _by_picture(row: dict[str, Any]) -> str:
    if "by_picture" not in row:
        return ""
    kept = row["by_picture"]["companion"]["as_often_as_rewrite"]
    return f"{percent(row['by_picture']['fsr']['share'])}, {percent(kept) if kept is not None else 'no companion'}"


def settings() -> str:
    result = read_result("settings")
    table = "\n".join(
        f"| {title} | {value} | {row['of']} | {share_of(row)} |"
        for key, title in (("steps", "steps"), ("scheduler", "sampler"), ("concept", "concept, names"))
        for value, row in result["fsr"][key].items()
    )  # fmt: skip
    return f"""**However it is drawn?** Every number of steps with every sampler, guidance 5, all concepts and names: FSR
{share_of(result["fsr"]["all"])} of {result["fsr"]["all"]["of"]} pictures; the unprotected ones show the concept in
{percent(result["shown_unprotected"]["share"])}. (`python -m benchmarks.evaluate settings`)

| by | | pictures | FSR |
| --- | --- | --- | --- |
{table}{refused(result["refused"])}"""


def envelope() -> str:
    result = read_result("envelope")
    fired, same = result["fired"], result["bit_identical_where_nothing_fired"]
    table = "\n".join(
        f"| {title} | {value} | {hits_of(row)} |"
        for key, title in (("steps", "steps"), ("scheduler", "sampler"), ("guidance", "guidance"))
        for value, row in result["by"][key].items()
    )  # fmt: skip
    first = ", ".join(f"{row['hits']} of {row['of']} ({steps})" for steps, row in result["first_step"].items())
    donut = ", ".join(
        f"{steps} ({'a donut' if row['donut'] else 'no donut'}{', fired' if row['fired'] else ''})"
        for steps, row in result["donut"].items()
    )
    return f"""**Does it fire on benign prompts?** Spread evenly over numbers of steps, samplers and guidance, half of them near
neighbours of a concept: on {hits_of(fired)}, {100 * fired["share"]:.2f} % ({100 * fired["low"]:.2f} to {100 * fired["high"]:.2f} %).{_promised(result)}
{same["hits"]} of the {same["of"]} other pictures equal the unprotected ones to the bit. In the first step alone, by number of steps: {first}.
"a donut on purple", by number of steps: {donut}. (`python -m benchmarks.evaluate envelope`)

| by | | fires |
| --- | --- | --- |
{table}{refused(result["refused"])}"""


def _promised(result: dict[str, Any]) -> str:
    if result["promised"] is None:
        return ""
    return (
        f" The promise is {100 * result['promised']:g} %: were it just kept, so many or more would fire with a probability of "
        f"{result['likelihood']:.2g}."
    )


def base() -> str:
    base = read_result("base_quality")["base"]
    names = sum(len(item.names) for item in load_vocabulary().objects.values())
    return f"""By the same judge the base model draws {percent(base["single"])} of single objects, asked for by its
{names} names, {percent(base["pair"])} of pairs (both found), {percent(base["style"])} of styles."""


def unfamiliar() -> str:
    result = read_result("unfamiliar")
    table = "\n".join(
        f"| {name} | {steps} | {hits_of(row['show_a_concept'])} | {hits_of(row['fired_without_a_concept'])}, "
        f"{share_of(row['fired_without_a_concept'])} | {hits_of(row['fired_at_first_step'])} | {hits_of(row['kept_where_fired'])} |"
        for name, by_steps in result["files"].items() for steps, row in by_steps.items()
    )  # fmt: skip
    kinds = "\n".join(
        f"| {name}: {kind} | {' | '.join(hits_of(row['kinds'][kind]) for row in by_steps.values())} |"
        for name, by_steps in result["files"].items() for kind in next(iter(by_steps.values()))["kinds"]
    )  # fmt: skip
    asking = "\n".join(
        f"| {kind} | {steps} | {hits_of(row['shows_a_concept_unprotected'])} | {hits_of(row['fired'])} "
        f"| {hits_of(row['shows_a_concept_protected'])} |"
        for steps, rows in result["asking"].items() for kind, row in rows.items()
    )  # fmt: skip
    steps = list(next(iter(result["files"].values())))
    return f"""**And on what neither model nor safety ever saw?** Prompts as users of Stable Diffusion write them, and of foreign
domains (`benchmarks/prompts`); none asks for a concept, but of strange words the model draws some. Fires: of the pictures in which
neither judge sees a concept. Kept: of those that fire and showed some object, those in which the judge still finds the one that it
was surest of. (`python -m benchmarks.evaluate unfamiliar`)

| prompts | steps | show a concept unprotected | fires without a concept | in the first step | kept where it fires |
| --- | --- | --- | --- | --- | --- |
{table}

| fires without a concept | {" | ".join(f"{number} steps" for number in steps)} |
| --- |{" --- |" * len(steps)}
{kinds}

Prompts that ask for a concept in strange words, beyond what is read, or against themselves:

| prompts | steps | show a concept unprotected | fires | and still show it protected |
| --- | --- | --- | --- | --- |
{asking}"""


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
        f"| {', '.join(row['asked'])} | {share_of(row['all_gone'])} | {row[distance]['mean']:.3f} "
        f"({row[distance]['low']:.3f} to {row[distance]['high']:.3f}) | {hits_of(row['fired_at_different_steps'])} |"
        for row in result["joint"]
    )
    return f"""**Do concepts get in each other's way?** Share of pictures in which something fired, and in which what was asked for is
gone; seen names. (`python -m benchmarks.evaluate interference`)

| enabled, asked for: | {" | ".join(asked)} |
| --- | {" | ".join("---" for _ in asked)} |
{matrix}

Asked for at once:

| asked for | all gone | `{distance.removesuffix("_to_rewrite")}` to the rewrite | fired at different steps |
| --- | --- | --- | --- |
{joint}"""


def _fired_and_gone(cell: dict[str, Any]) -> str:
    return percent(cell["fired"]["share"]) + (f", {percent(cell['gone']['share'])}" if "gone" in cell else "")


def added() -> str:
    result = read_result("added")
    seen, held = (result["forgetting"][part]["fsr_protected"] for part in ("seen", "held_out"))
    kinds = ("decisions_equal", "pictures_equal", "new_one_fired")
    equal, pictures, idle = (
        {count: sum(entry[kind][count] for entry in result["others"].values()) for count in ("hits", "of")} for kind in kinds
    )
    return f"""**A fourth concept, added to the finished module** ({result["concept"]},
{result["training"]["minutes"]} minutes of training): FSR {share_of(seen)} on seen, {share_of(held)} on held-out names. Of the others
{hits_of(equal)} decisions and {hits_of(pictures)} pictures are as before, and the new one fires on {hits_of(idle)} pictures that were
not asked to show it. (`python -m benchmarks.evaluate added`)"""


def ablation() -> str:
    result = read_result("ablation")
    table = "\n".join(
        f"| {title}{'' if row.get('recalibrated', True) else ', thresholds as they are'} | {share_of(row['fired_without_a_concept'])} "
        f"| {share_of(row['fsr'])} | {percent(row['companion']['share'])} | {hits_of(row['asr'])}, {percent(row['asr']['share'])} "
        f"| {percent(row['detected_early']['share'])} |"
        for title, row in result["rows"].items()
    )
    return f"""**What is each mechanism for?** The shipped module with one left out at a time, {result["steps"]} steps, the same
prompts and seeds for all. Where scores change without it, thresholds are set again to the same promise. Everyday: pictures of
everyday prompts without a concept that fire. Attacks: of all families by text and all concepts, to both judges. (`python -m
benchmarks.evaluate ablation`)

| left out | everyday | FSR | companion kept | attacks that get through | detected by 40 % of the steps |
| --- | --- | --- | --- | --- | --- |
{table}"""


def statistic() -> str:
    result = read_result("statistic")
    table = "\n".join(
        f"| {title} | {share_of(row['detected'])} | {share_of(row['early'])} |" for title, row in result["rows"].items()
    )
    return f"""**The highest step, or a sum over steps?** Of {result["unsafe"]} recorded runs across the envelope that ask for a concept and
that training left out, those that each statistic of the same scores detects, at its own threshold by the same
{result["benign"]} benign pictures, of which {result["allowed"]} may reach it. The sum is a sequential one, weighted by the change in log-SNR; its
drift is what a step must exceed to count. (`{result["environment"]["command"]}`)

| statistic | detected | by 40 % of the steps |
| --- | --- | --- |
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
