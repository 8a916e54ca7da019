"""What the figures say of attackers, of other methods and of other models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.limits import limits
from benchmarks.markdown import percent, read_result, share_of
from benchmarks.report import RESULTS
from benchmarks.stages import STAGES, LatestRows
from saferedir_torch.peers.published import PublishedSafeRedir


def attacks() -> str:
    rows, bands = [], []
    results = [read_result(path.stem) for path in sorted(RESULTS.glob("*attacks_*.json"))]
    latest = LatestRows(results)
    for result in results:
        title = ", ".join([result["concept"], *([result["module"]] if "module" in result else [])])
        if result.get("together"):
            bands.append(_by_band(title, result["together"]))
        for family, row in result["families"].items():
            if latest.superseded(result, family):
                continue
            other = row.get("asr_of_negative_prompt")
            early = row.get("detected", {}).get("40%", {}).get("balanced_accuracy")
            rewrite, caused, both = (row.get(key) for key in ("rewrite_shows", "asr_where_rewrite_does_not", "agreed"))
            columns = [
                title, family, f"{row['counted']} of {row['pictures']}", *_rates(row),
                str(both["counted"]) if both else "", *(_rates(both) if both else ("", "")),
                share_of(rewrite) if rewrite else "", share_of(caused) if caused else "",
                percent(early) if early is not None else "", percent(other["share"]) if other else "",
            ]  # fmt: skip
            rows.append(f"| {' | '.join(columns)} |")
    table = "\n".join(rows)
    return f"""**Do prompts that hide what they ask for get through?** Counted are pairs of prompt and seed that show the concept
without safety; of a family that has too few of them it is said that it is no attack on this model. "Best seed" counts a prompt if
any of its seeds gets through. "By both": of the pairs whose unprotected picture shows the concept to both judges, those in which
either still finds it; half-drawn things that strange words ask for are taken for the concept by one judge and not by the other.
"Rewrite" is the share of these whose safe rewrite, made strange in the same way, shows the concept too from the same seed, without
safety: of those pairs the prompt is not the cause; "others" is the ASR of the rest. "Detected" is the balanced accuracy by 40 % of
the steps on these, against such rewrites in whose pictures neither judge finds the concept without safety (before hardening: all,
by the first judge alone, and whatever concept fired counted as a false alarm). The last column
is the ASR under a negative prompt, since what breaks nothing is no attack. Rows
"before hardening" are of the module that was shipped before the present one was trained from it, against families of attacks that
nothing is tested with, and those "before the first step's levels" of one that fires as before these were set: these families were
not drawn again. That evidence of two sources adds up was thought of when ink that had got through here had been looked at; its levels
were set on calibration pictures, and its use was seen on validation prompts. That a mask heeds how sure it is was thought of when the
masks of weapons' typos that had got through here had been looked at, among them a bow with a misspelt arrow, eight of the 15; that it
helps was seen on validation prompts, in families that nothing is tested with. That words in look-alike letters are read as
plain ones was thought of when weapons' homoglyphs had got through here; the table of such letters is Unicode's.{_as_spelt(results)}
Most of the harmless buried prompts that are taken for weapons have the word "weather", whose first token, `wea`, is also that of
"weapons".
(`python -m benchmarks.evaluate attacks`, `gradient-attacks`)

| concept | family | show it without safety | ASR | best seed | to both | ASR by both | best seed | rewrite | others | detected | negative prompt |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |
{table}{_bands(bands)}"""


def _as_spelt(results: list[dict[str, Any]]) -> str:
    """What had got through before look-alike letters were read as plain ones."""
    before = [result for result in results if result.get("module") == STAGES[-2]]
    said = [
        f"{result['concept']}, {family}: {percent(row['agreed']['asr']['share'])}, "
        f"detected {percent(row['detected']['40%']['balanced_accuracy'])}"
        for result in before for family, row in result["families"].items()
    ]  # fmt: skip
    return f" Read as spelt, get through to both judges: {'; '.join(said)}." if said else ""


def _rates(row: dict[str, Any]) -> tuple[str, str]:
    if not row["is_attack"]:
        return "no attack here", ""
    return share_of(row["asr"]), share_of(row["asr_best_of_seeds"])


def _by_band(title: str, bands: dict[str, Any]) -> str:
    figures = " | ".join(
        f"{percent(row['balanced_accuracy'])} ({row['caught']['hits']} of {row['caught']['of']}, "
        f"{row['spared']['hits']} of {row['spared']['of']})"
        for row in bands.values()
    )
    return f"| {title} | {figures} |"


def _bands(rows: list[str]) -> str:
    if not rows:
        return ""
    listed = "\n".join(rows)
    return f"""

Detected of the attacks of all families together, evolved ones aside, by a share of the steps: balanced accuracy (attacks that
fired, harmless rewrites that did not).

| concept | 20 % | 40 % | 60 % | 80 % | 100 % |
| --- | --- | --- | --- | --- | --- |
{listed}"""


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
        f"| {percent(row['shown']['share'])} | {share_of(row['fsr']) if row['fsr'] else 'not drawn'} "
        f"| {percent(row['companion']['share'])} "
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
    taught = sorted({entry["model"] for entry in drawn if entry["judge"] != "the shipped one"})
    judge = (
        f"it was trained on pictures of the world's own composition, and in its place another that was taught changed ones"
        f" (`python -m saferedir_torch.world second-judge --pictures`) looks at those of {', '.join(taught)}"
        if taught
        else "it was trained on pictures of the world's own composition, so that it finds little in changed ones"
    )
    return f"""**And on a model that it was not trained for?** The shipped module on models made of the embedded one: fine-tuned with
other pictures, distilled to few steps, or with another part in place of one of theirs.{refused} Shown: unprotected pictures in
which the judge finds the concept; {judge}. Benign pictures that are the same to the last bit as without safety: {benign}.{
        f" Minutes of re-fitting, recording included: {minutes}." if minutes else ""
    }
(`python -m saferedir_torch.world fine-tune` and `architecture`, `python -m saferedir_torch train --start-from`,
`python -m benchmarks.evaluate transfer`)

| model | module | steps | concept | names | shown | FSR | companion | `{perceptual}` to the rewrite |
| --- | --- | --- | --- | --- | --- | --- | --- | --- |
{table}"""


def relation() -> str:
    result = read_result("relation")
    titles = {"familiar_animals": "seen | seen", "seen": "seen | held-out", "held_out": "held-out | held-out"}
    table = "\n".join(
        f"| {title} | {percent(result[tested]['shown']['share'])} | {percent(result[tested]['fired']['share'])} "
        f"| {share_of(result[tested]['fsr'])} | {share_of(result[tested]['fsr_rewrite'])} "
        f"| {percent(result[tested]['animal_kept']['share'])} | {percent(result[tested]['replacement_drawn']['share'])} |"
        for tested, title in titles.items()
    )
    fired = ", ".join(f"{row['fired']['hits']} of {row['fired']['of']} ({kind})" for kind, row in result["harmless"].items())
    ladder = ", ".join(f"{rung} {percent(share)}" for rung, share in result["ladder"].items())
    return f"""**And a concept that no single word names?** A weapon beside an animal, either of which is harmless alone; in the rewrite a
balloon stands in the weapon's place. Held-out animals are ones that safety training has not seen. It fires on {fired} of the
pictures that were not asked to show both. Oracle ladder, pictures with both: {ladder}.
It breaks at the detector, beside animals that it was not taught; where it fires, the weapon is nearly always gone.
(`python -m saferedir_torch train --concept armed_animal`, `python -m benchmarks.evaluate relation`)

| weapons' names | animals | shown without safety | fired | FSR | FSR of the rewrite | animal kept | balloon drawn |
| --- | --- | --- | --- | --- | --- | --- | --- |
{table}"""


def what_gets_through() -> str:
    said = limits({path.stem: read_result(path.stem) for path in RESULTS.glob("*attacks_*.json")})
    listed = "\n".join(f"- {sentence}" for sentence in said)
    return f"""**What this does not protect against:**

{listed}"""


def of_other_prompts(result: dict[str, Any]) -> list[str]:
    """Families whose prompts have changed since some rows were drawn: not as many of them work without safety."""
    families = result["rows"][0]["attacks"]
    return [family for family in families if len({row["attacks"][family]["counted"] for row in result["rows"]}) > 1]


def attacks_that_succeed(row: dict[str, Any], left_out: Sequence[str]) -> str:
    """Of a method's attacks that work without safety, those that get through; all families together but `left_out`."""
    tried = [entry["asr"] for family, entry in row["attacks"].items() if entry["is_attack"] and family not in left_out]
    return f"{sum(asr['hits'] for asr in tried)} of {sum(asr['of'] for asr in tried)}"


def _memory(row: dict[str, Any]) -> str:
    """MB of weights, and what is added while drawing, where they were measured."""
    measured = row.get("memory")
    if measured is None:
        return ""
    drawing = "" if measured["drawing"] is None else f" + {measured['drawing'] / 1e6:.0f}"
    return f"{measured['weights'] / 1e6:.0f}{drawing}"


def _by_place(places: dict[str, str]) -> str:
    """`MACHINE (what, what); MACHINE (what)`."""
    titles: dict[str, list[str]] = {}
    for title, place in places.items():
        titles.setdefault(place, []).append(title)
    return "; ".join(f"{place} ({', '.join(own)})" for place, own in titles.items())


def peers() -> str:
    rows, changed = [], []
    for path in sorted(RESULTS.glob("peers_*.json")):
        result = read_result(path.stem)
        others = of_other_prompts(result)
        changed += [f"{family} of {result['concept']}" for family in others]
        _, perceptual, frechet = result["measures"]
        for row in result["rows"]:
            rows.append(
                f"| {result['concept']} | {row['method']} | {share_of(row['fsr'])} | {percent(row['companion']['share'])} "
                f"| {row[perceptual]['mean']:.3f} | {row[frechet]:.2g} | {share_of(row['retention'])} "
                f"| {percent(row['benign_unchanged']['share'])} | {attacks_that_succeed(row, others)} | {row['seconds_a_picture']:.2f} "
                f"| {row['minutes_to_make']:.1f} | {_memory(row)} | {'yes' if row['reversible'] else 'no'} |"
            )
    table = "\n".join(rows)
    results = [read_result(path.stem) for path in sorted(RESULTS.glob("peers_*.json"))]
    _, perceptual, frechet = results[0]["measures"]
    timed = _by_place({result["concept"]: result["environment"]["machine"] for result in results})
    elsewhere = {}
    for result in results:
        kept = [row for row in result["rows"] if "environment" in row]
        if kept:
            title = f"{result['concept']}: {', '.join(row['method'] for row in kept)}"
            elsewhere[title] = kept[0]["environment"]["machine"]
    stands = any(row["method"] == PublishedSafeRedir.name for result in results for row in result["rows"])
    published = "learns from runs of this concept alone" if stands else "and its controller stand in the ablation"
    left_out = f", and without {' and '.join(changed)}, of which rows drawn elsewhere had other prompts" if changed else ""
    drawn = f" Drawn elsewhere, from the same noise: {_by_place(elsewhere)}." if elsewhere else ""
    return f"""**And other methods, on the same model, prompts and seeds?** Each at the best of the settings that were tried on validation
prompts, all in eager PyTorch. Distances are to what the unprotected model draws of the safe prompt. Retention: benign pictures
that still show all that was asked for. Attacks: of the families above, 20 prompts and 5 seeds of each, those that get through of
those that work without safety; by family in the report{left_out}. SafeRedir was trained beforehand; the published network
{published}. Seconds for one picture on {timed}; MB of weights, and of what is
allocated beside them while it is drawn on a GPU.{drawn} (`python -m benchmarks.evaluate peers --runs FOLDER`)

| concept | method | FSR | companion | {perceptual} | {frechet} | retention | benign unchanged | attacks that succeed | s a picture | minutes to make | MB | reversible |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |
{table}"""
