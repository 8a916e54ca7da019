"""What the README says of the method: is the concept gone, is everything else untouched, and what makes it so."""

from __future__ import annotations

from typing import Any

from benchmarks.limits import limits
from benchmarks.markdown import drawn_on, hits_of, percent, read_result, share_of, worst_of
from benchmarks.report import RESULTS
from saferedir_torch.world.vocabulary import load_vocabulary

#: Of which the README shows a row.
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

![Rows: unprotected, protected, safe rewrite](benchmarks/results/forgetting_church_held_out.png)"""


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
    result = {kind: row for kind, row in read_result("unfamiliar").items() if kind != "environment"}
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


def strength() -> str:
    result = read_result("strength")
    _, perceptual, frechet = result["measures"]
    table = "\n".join(
        f"| {name} | {row['strength']} | {share_of(row['fsr'])} | {row[perceptual]['mean']:.4f} | {1e4 * row[frechet]:.2f} "
        f"| {percent(row['companion']['share'])} |"
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
FSR and {perceptual} (paired bootstrap, 95 %): {"; ".join(better) or "none"}. The step length of each token answers to the
prompt under all of them; "adaptive" moves further where a concept fires again. (`python -m benchmarks.evaluate strength`)

| concept | strength | FSR | {perceptual} to the rewrite | {frechet} to the rewrite, times 10,000 | companion |
| --- | --- | --- | --- | --- | --- |
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
validation prompts. (`python -m saferedir_torch oracle`)

| concept | rung | found | replacement drawn | companion kept |
| --- | --- | --- | --- | --- |
{table}"""


def attacks() -> str:
    rows = []
    for stem in sorted(path.stem for path in RESULTS.glob("*attacks_*.json")):
        result = read_result(stem)
        title = ", ".join([result["concept"], *([result["module"]] if "module" in result else [])])
        for family, row in result["families"].items():
            rates = (
                f"{share_of(row['asr'])} | {share_of(row['asr_best_of_seeds'])}" if row["is_attack"] else "no attack here | "
            )
            other = row.get("asr_of_negative_prompt")
            early = row.get("detected", {}).get("40%", {}).get("balanced_accuracy")
            rewrite, caused = row.get("rewrite_shows"), row.get("asr_where_rewrite_does_not")
            rows.append(
                f"| {title} | {family} | {row['counted']} of {row['pictures']} | {rates} "
                f"| {share_of(rewrite) if rewrite else ''} | {share_of(caused) if caused else ''} | {percent(early) if early is not None else ''} "
                f"| {percent(other['share']) if other else ''} |"
            )
    table = "\n".join(rows)
    return f"""**Do prompts that hide what they ask for get through?** Counted are pairs of prompt and seed that show the concept
without safety; of a family that has too few of them it is said that it is no attack on this model. "Best seed" counts a prompt if
any of its seeds gets through. "Rewrite" is the share of the counted pairs whose safe rewrite, made strange in the same way, shows the
concept too from the same seed, without safety: of those pairs the prompt is not the cause; "others" is the ASR of the rest. "Detected"
is the balanced accuracy by 40 % of the steps, against such rewrites. The last column is the ASR under a negative prompt, since what
breaks nothing is no attack. Rows that name a module are of the one in `benchmarks/modules`, on fewer prompts; all others are of the
shipped one. (`python -m benchmarks.evaluate attacks`, `gradient-attacks`)

| concept | family | show it without safety | ASR | ASR, best seed | rewrite | others | detected | negative prompt |
| --- | --- | --- | --- | --- | --- | --- | --- | --- |
{table}"""


def generalisation() -> str:
    result = read_result("generalisation")
    kinds = ("no family", "all others", "all families")
    table = "\n".join(
        f"| {family} | {rows['no family']['counted']} of {rows['no family']['pictures']} | "
        + " | ".join(share_of(rows[kind]["asr"]) if rows[kind]["is_attack"] else "no attack here" for kind in kinds)
        + " |"
        for family, rows in result["families"].items()
    )
    fired = ", ".join(f"{row['hits']} of {row['of']} ({title})" for title, row in result["benign_fired"].items())
    return f"""**Does training against some attacks help against others?** Modules of {result["concept"]} alone, {result["steps"]} steps each, not calibrated,
trained against no family of attacks, against all others than the one that is tried, and against all. They fire on {fired} of benign
pictures. (`python -m benchmarks.evaluate generalisation`)

| tried | show it without safety | ASR, trained against none | against all others | against all |
| --- | --- | --- | --- | --- |
{table}"""


def transfer() -> str:
    result = read_result("transfer")
    perceptual = result["measures"][1]
    drawn = [entry for entry in result["entries"] if "refused" not in entry]
    table = "\n".join(
        f"| {entry['model']} | {entry['module']} | {entry['steps']} | {concept} | {part.replace('_', '-')} "
        f"| {percent(row['shown']['share'])} | {share_of(row['fsr'])} | {percent(row['companion']['share'])} "
        f"| {row[perceptual]['mean']:.3f} |"
        for entry in drawn
        for concept, parts in entry["concepts"].items()
        for part, row in parts.items()
    )
    benign = "; ".join(
        f"{entry['model']}, {entry['module']}: {entry['benign_unchanged']['hits']} of {entry['benign_unchanged']['of']}"
        for entry in drawn
    )
    minutes = ", ".join(f"{entry['model']} {entry['minutes']:g}" for entry in drawn if entry["minutes"] is not None)
    refused = "".join(
        f" On {entry['model']} it is refused ({entry['refused']})." for entry in result["entries"] if "refused" in entry
    )
    return f"""**And on a model that it was not trained for?** The shipped module on models made of the embedded one: fine-tuned with
other pictures, distilled to few steps, or with another part in place of one of theirs.{refused} Shown: unprotected pictures in
which the concept is found. Benign pictures that are the same to the last bit as without safety: {benign}.{
        f" Minutes of re-fitting, recording included: {minutes}." if minutes else ""
    }
(`python -m saferedir_torch.world fine-tune` and `architecture`, `python -m saferedir_torch train --start-from`,
`python -m benchmarks.evaluate transfer`)

| model | module | steps | concept | names | shown | FSR | companion | `{perceptual}` to the rewrite |
| --- | --- | --- | --- | --- | --- | --- | --- | --- |
{table}"""


def relation() -> str:
    result = read_result("relation")
    table = "\n".join(
        f"| {part.replace('_', '-')} | {percent(result[part]['shown']['share'])} | {share_of(result[part]['fsr'])} "
        f"| {share_of(result[part]['fsr_rewrite'])} | {percent(result[part]['animal_kept']['share'])} "
        f"| {percent(result[part]['replacement_drawn']['share'])} |"
        for part in ("seen", "held_out")
    )
    fired = ", ".join(f"{row['fired']['hits']} of {row['fired']['of']} ({kind})" for kind, row in result["harmless"].items())
    ladder = ", ".join(f"{rung} {percent(share)}" for rung, share in result["ladder"].items())
    return f"""**And a concept that no single word names?** A weapon beside an animal, either of which is harmless alone; in the rewrite a
balloon stands in the weapon's place. Animals are ones that training has not seen beside weapons. It fires on {fired} of the
pictures that do not show both. Oracle ladder, pictures with both: {ladder}.
(`python -m saferedir_torch train --concept armed_animal`, `python -m benchmarks.evaluate relation`)

| weapons' names | shown without safety | FSR | FSR of the rewrite | animal kept | balloon drawn |
| --- | --- | --- | --- | --- | --- |
{table}"""


def what_gets_through() -> str:
    said = limits({path.stem: read_result(path.stem) for path in RESULTS.glob("*attacks_*.json")})
    listed = "\n".join(f"- {sentence}" for sentence in said)
    return f"""**What this does not protect against:**

{listed}"""


def _memory(row: dict[str, Any]) -> str:
    """MB of weights, and what is added while drawing, where they were measured."""
    measured = row.get("memory")
    if measured is None:
        return ""
    drawing = "" if measured["drawing"] is None else f" + {measured['drawing'] / 1e6:.0f}"
    return f"{measured['weights'] / 1e6:.0f}{drawing}"


def peers() -> str:
    rows = []
    for path in sorted(RESULTS.glob("peers_*.json")):
        result = read_result(path.stem)
        _, perceptual, frechet = result["measures"]
        for row in result["rows"]:
            tried = [entry["asr"] for entry in row["attacks"].values() if entry["is_attack"]]
            succeed, of = (sum(entry[key] for entry in tried) for key in ("hits", "of"))
            rows.append(
                f"| {result['concept']} | {row['method']} | {share_of(row['fsr'])} | {percent(row['companion']['share'])} "
                f"| {row[perceptual]['mean']:.3f} | {row[frechet]:.2g} | {share_of(row['retention'])} "
                f"| {percent(row['benign_unchanged']['share'])} | {succeed} of {of} | {row['seconds_a_picture']:.2f} "
                f"| {row['minutes_to_make']:.1f} | {_memory(row)} | {'yes' if row['reversible'] else 'no'} |"
            )
    table = "\n".join(rows)
    _, perceptual, frechet = read_result("peers_church")["measures"]
    machine = read_result("peers_church")["environment"]["machine"]
    return f"""**And other methods, on the same model, prompts and seeds?** Each at the best of the settings that were tried on validation
prompts, all in eager PyTorch. Distances are to what the unprotected model draws of the safe prompt. Retention: benign pictures
that still show all that was asked for. Attacks: of the families above, 20 prompts and 5 seeds of each, those that get through of
those that work without safety; by family in the report. SafeRedir was trained beforehand; the
published network and controller stand in the ablation. Seconds for one picture on {machine}; MB of weights, and of what is
allocated beside them while it is drawn. (`python -m benchmarks.evaluate peers --runs FOLDER`)

| concept | method | FSR | companion | {perceptual} | {frechet} | retention | benign unchanged | attacks that succeed | s a picture | minutes to make | MB | reversible |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |
{table}"""
