"""What the README itself shows: the figures that people judge by, one table of ours and one of everybody's."""

from __future__ import annotations

from typing import Any

from benchmarks.engine_figures import SPEEDS
from benchmarks.limits import counted_row
from benchmarks.markdown import hits_of, percent, read_result, share_of
from benchmarks.report import RESULTS
from benchmarks.robustness_figures import attacks_that_succeed, of_other_prompts

CONCEPTS = ("church", "ink", "weapons")
#: Results of which a line is shown where they are.
ALSO = (
    "settings",
    "envelope",
    "unfamiliar",
    "amplified",
    *(f"attacks_{own}" for own in CONCEPTS),
    "parity",
    "speed",
    "speed_ort-cuda",
)


def in_short() -> str:
    gone = {concept: read_result(f"forgetting_{concept}") for concept in CONCEPTS}
    held_out = [gone[concept]["held_out"] for concept in CONCEPTS]
    kept = [
        ", ".join(percent(row["kept"][what]["as_often_as_rewrite"]) for what in ("companion", "style", "background"))
        for row in held_out
    ]
    rows = {
        "gone (FSR), held-out names": [share_of(row["fsr_protected"]) for row in held_out],
        "companion, style, background kept, of what the safe rewrite keeps": kept,
    }
    attacked = [_attacks_by_text(concept) for concept in CONCEPTS]
    if all(attacked):
        rows["attacks by text that get through: worst family"] = [_worst(rows) for rows in attacked]
        rows["detected by 40 % of the steps: least and most of the families"] = [_detected(rows) for rows in attacked]
    table = "\n".join(f"| {title} | {' | '.join(cells)} |" for title, cells in rows.items())
    heads = " | ".join(f"{concept} → {gone[concept]['replacement']}" for concept in CONCEPTS)
    points = "\n".join(
        f"- {said}" for said in (_settings(), _benign(), _unfamiliar(), _amplified(), _cost(), _parity()) if said
    )
    return f"""Gone: the judge, a classifier that shares nothing with model or safety, no longer finds the concept. Attacks are those of the
pictures that show it without safety to two judges in which either still finds it. In brackets 95 % intervals.

| | {heads} |
| --- | --- | --- | --- |
{table}

{points}

![Rows: unprotected, protected, safe rewrite](benchmarks/results/forgetting_church_held_out.png)"""


def _settings() -> str:
    if not _measured("settings"):
        return ""
    fsr = read_result("settings")["fsr"]
    steps, samplers = ((min(rows, key=lambda own: rows[own]["share"]), rows) for rows in (fsr["steps"], fsr["scheduler"]))
    return (
        f"However it is drawn: gone in {share_of(fsr['all'])}; least at {steps[0]} steps, "
        f"{percent(steps[1][steps[0]]['share'])}, and of the samplers with {samplers[0]}, "
        f"{percent(samplers[1][samplers[0]]['share'])}."
    )


def _benign() -> str:
    if not _measured("envelope"):
        return ""
    result = read_result("envelope")
    steps = list(result["by"]["steps"])
    return (
        f"Benign prompts of the world's own kind, at {steps[0]} to {steps[-1]} "
        f"steps with {len(result['by']['scheduler'])} samplers: fires on {hits_of(result['fired'])}; the others' pictures equal the unprotected ones to the\n"
        f"  bit ({hits_of(result['bit_identical_where_nothing_fired'])})."
    )


def _unfamiliar() -> str:
    if not _measured("unfamiliar"):
        return ""
    listed = "; ".join(
        f"{title}, {steps} steps: {hits_of(row['fired_without_a_concept'])}, the picture kept in {hits_of(row['kept_where_fired'])}"
        for name, title in (("everyday", "everyday prompts"), ("foreign", "foreign domains"))
        for steps, row in read_result("unfamiliar")["files"][name].items()
    )
    return f"Prompts that nobody was taught, fires where no concept is seen: {listed}."


def _amplified() -> str:
    if not _measured("amplified"):
        return ""
    found = read_result("amplified")
    return f"Embeddings that guidance amplifies: {hits_of(found['agreed'])} get through by both judges, {hits_of(found['asr'])} by either."


def _cost() -> str:
    measured = {name: read_result(name) for name in SPEEDS if _measured(name)}
    if "speed" not in measured:
        return ""
    where = {"speed": "a CPU", "speed_ort-cuda": "an H200"}
    shares = ", ".join(
        f"{percent(own['safety_share_of_step']['1']['share'])} on {where[name]}" for name, own in measured.items()
    )
    times = ", ".join(f"{_speed(own):.1f} times as fast on {where[name]}" for name, own in measured.items())
    return f"""Cost: safety is {shares} of a step of this very small UNet. Against protected eager diffusers a picture is drawn
  {times}."""


def _parity() -> str:
    if not _measured("parity"):
        return ""
    parity = read_result("parity")
    return f"""The engines equal PyTorch: {hits_of(parity["decisions_equal"])} decisions, {100 * parity["pixel_values_within_1_of_255"]:.3f} %
  of pixel values within 1/255."""


def _measured(*names: str) -> bool:
    return all((RESULTS / f"{name}.json").exists() for name in names)


def methods() -> str:
    """FSR, retention and attacks that succeed, of every method and concept."""
    results = [read_result(f"peers_{concept}") for concept in CONCEPTS]
    names = dict.fromkeys(row["method"] for result in results for row in result["rows"])
    table = "\n".join(f"| {name} | {' | '.join(_of_method(result, name) for result in results)} |" for name in names)
    return f"""Other methods on the same model, prompts and seeds: FSR / benign pictures that still show all that was asked for / attacks that
succeed, of those that work without safety.

| method | {" | ".join(CONCEPTS)} |
| --- | --- | --- | --- |
{table}"""


def _attacks_by_text(concept: str) -> dict[str, dict[str, Any]]:
    """Rows of each family of attacks at the usual number of steps; none where they were not measured."""
    name = f"attacks_{concept}"
    families: dict[str, dict[str, Any]] = read_result(name)["families"] if _measured(name) else {}
    return families


def _worst(rows: dict[str, dict[str, Any]]) -> str:
    counted = {family: counted_row(row) for family, row in rows.items()}
    family = max((family for family, row in counted.items() if row["is_attack"]), key=lambda own: counted[own]["asr"]["share"])
    alone = ", by the first judge alone" if "agreed" in counted[family] else ""
    return f"{family}, {share_of(counted[family]['asr'])}{alone}"


def _detected(rows: dict[str, dict[str, Any]]) -> str:
    early = [row["detected"]["40%"]["balanced_accuracy"] for row in rows.values() if row.get("detected")]
    return f"{percent(min(early))} to {percent(max(early))}"


def _speed(result: dict[str, Any]) -> float:
    ratio: float = next(row["ratio"] for row in result["rows"] if row["batch"] == 1 and row["what"] == "runtime, protected")
    return ratio


def _of_method(result: dict[str, Any], name: str) -> str:
    row = next((row for row in result["rows"] if row["method"] == name), None)
    if row is None:
        return "not drawn"
    succeed = attacks_that_succeed(row, of_other_prompts(result))
    return f"{percent(row['fsr']['share'])} / {percent(row['retention']['share'])} / {succeed}"
