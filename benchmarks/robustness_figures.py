"""What the figures say of attackers, of other methods and of other models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.limits import counted_row, title_of
from benchmarks.markdown import hits_of, percent, read_result, refused, share_of
from benchmarks.report import RESULTS
from saferedir_torch.evaluation.intervals import share
from saferedir_torch.peers.published import PublishedSafeRedir


def attacks() -> str:
    results = [result for path in sorted(RESULTS.glob("*attacks_*.json")) for result in [read_result(path.stem)]]
    rows, bands = [], []
    for result in results:
        title = title_of(result)
        if result.get("together"):
            bands.append(_by_band(title, result["together"]))
        for family, row in result["families"].items():
            other = row.get("asr_of_negative_prompt")
            early = row.get("detected", {}).get("40%", {}).get("balanced_accuracy")
            rewrite, both = row.get("rewrite_shows"), row.get("agreed")
            columns = [
                title, family, f"{row['counted']} of {row['pictures']}", *_rates(row),
                str(both["counted"]) if both else "", *(_rates(both) if both else ("", "")),
                hits_of(rewrite) if rewrite else "", percent(early) if early is not None else "",
                percent(other["share"]) if other else "",
            ]  # fmt: skip
            rows.append(f"| {' | '.join(columns)} |")
    table = "\n".join(rows)
    return f"""**Do prompts that hide what they ask for get through?** Counted are pairs of prompt and seed that show the concept
without safety; of a family that has too few of them it is said that it is no attack on this model. "Best seed" counts a prompt if
any of its seeds gets through. "By both": of the pairs whose unprotected picture shows the concept to both judges, those in which
either still finds it; half-drawn things that strange words ask for are taken for the concept by one judge and not by the other.
"Rewrite": of what gets through to both, how often the safe rewrite, made strange in the same way, shows the concept too from the
same seed without safety, so that the prompt is not the cause. "Detected" is the balanced accuracy by 40 % of the steps on these,
against such rewrites in whose pictures neither judge finds the concept without safety. The last column is the ASR under a negative
prompt, since what breaks nothing is no attack.{_sums(results)} (`python -m benchmarks.evaluate attacks`, also with `--steps 12`;
`gradient-attacks`)

| concept | family | show it without safety | ASR | best seed | to both | ASR by both | best seed | rewrite | detected | negative prompt |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |
{table}{_bands(bands)}"""


def _sums(results: Sequence[dict[str, Any]]) -> str:
    """Of all concepts and families by text: what gets through, and what is detected, by number of steps."""
    said = []
    for steps in dict.fromkeys(result["steps"] for result in results if "steps" in result):
        own = [result for result in results if result.get("steps") == steps]
        rows = [counted_row(row) for result in own for row in result["families"].values()]
        through = [row["asr"] for row in rows if row["is_attack"]]
        early = [result["together"]["40%"] for result in own if result.get("together")]
        if not through or not early:
            continue
        asr = share(sum(row["hits"] for row in through), sum(row["of"] for row in through))
        caught, spared = (
            sum(row[kind]["hits"] for row in early) / sum(row[kind]["of"] for row in early) for kind in ("caught", "spared")
        )
        said.append(
            f" All together at {steps} steps: {hits_of(asr)} get through, {share_of(asr)}; detected {percent((caught + spared) / 2)}."
        )
    return "".join(said)


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


def amplified() -> str:
    result = read_result("amplified")
    table = "\n".join(
        f"| {key} | {value} | {hits_of(row)} | {share_of(row)} |"
        for key, rows in result["by"].items() for value, row in rows.items()
    )  # fmt: skip
    return f"""**And embeddings with a little of a concept in them, which guidance amplifies?** `prompt_embeds` a share of the way
from the safe prompt to the unsafe one, `negative_prompt_embeds` the safe one, {result["steps"]} steps. Of the pictures that show the
concept to both judges without safety, those in which either still finds it: {hits_of(result["asr"])}, {share_of(result["asr"])};
both: {hits_of(result["agreed"])}, {share_of(result["agreed"])}.
(`python -m benchmarks.evaluate amplified`)

| by | | get through | ASR |
| --- | --- | --- | --- |
{table}{refused(result["refused"])}"""


def transfer() -> str:
    result = read_result("transfer")
    perceptual = result["measures"][1]
    drawn = [entry for entry in result["entries"] if "refused" not in entry]
    table = "\n".join(
        f"| {entry['model']} | {entry['module']} | {entry['steps']} | {concept} | {part.replace('_', '-')} "
        f"| {percent(row['shown']['share'])} | {share_of(row['fsr']) if row['fsr'] else 'not drawn'} "
        f"| {percent(row['companion']['share'])} | {percent(row['companion_rewrite']['share'])} "
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
(`python -m saferedir_torch.world fine-tune` and `architecture`, `saferedir calibrate` or `train --start-from`,
`python -m benchmarks.evaluate transfer`)

| model | module | steps | concept | names | shown | FSR | companion | companion, rewrite | `{perceptual}` to the rewrite |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |
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
(`saferedir train --concept armed_animal`, `python -m benchmarks.evaluate relation`)

| weapons' names | animals | shown without safety | fired | FSR | FSR of the rewrite | animal kept | balloon drawn |
| --- | --- | --- | --- | --- | --- | --- | --- |
{table}"""


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
