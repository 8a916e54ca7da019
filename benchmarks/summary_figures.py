"""What the README shows: whether it works, what it costs, and what it does not do."""

from __future__ import annotations

from typing import Any

from benchmarks.limits import counted_row, limits
from benchmarks.markdown import hits_of, percent, read_result
from benchmarks.report import RESULTS

CONCEPTS = ("church", "ink", "weapons")


def works() -> str:
    """Gone, kept, the worst attack; and how often it fires without a concept."""
    gone = [read_result(f"forgetting_{concept}") for concept in CONCEPTS]
    held_out = [result["held_out"] for result in gone]
    rows = {
        "gone, by names that training has not seen": [hits_of(row["fsr_protected"]) for row in held_out],
        "what stands beside it stays, of what a safe rewrite keeps": [
            percent(row["kept"]["companion"]["as_often_as_rewrite"]) for row in held_out
        ],
        "worst attack by text": [_worst(concept) for concept in CONCEPTS],
    }
    heads = " | ".join(f"{concept}, drawn as {result['replacement']}" for concept, result in zip(CONCEPTS, gone, strict=True))
    table = "\n".join(f"| {title} | {' | '.join(cells)} |" for title, cells in rows.items())
    return f"""On the small diffusion model that ships with it, by judges that share nothing with model or safety:

| | {heads} |
| --- | --- | --- | --- |
{table}

| pictures without a concept | fire |
| --- | --- |
{_false_alarms()}

Where nothing fires the picture is the unprotected one, to the bit."""


def costs() -> str:
    """Of one picture, beside what a user would take instead."""
    speed = read_result("speed")
    rows = [row for row in speed["rows"] if row["batch"] == 1]
    table = "\n".join(f"| {row['what']} | {row['seconds_per_image']:.2f} s | {row['ratio']:.1f}x |" for row in rows)
    shares, large = speed["safety_share_of_step"], read_result("safety_cost")["rows"][0]
    return f"""A picture of {speed["steps"]} steps on {speed["environment"]["machine"]}:

| | a picture | speed |
| --- | --- | --- |
{table}

Safety is {percent(shares["1"]["share"])} of a step of this very small UNet, {percent(shares["8"]["share"])} in batches of eight.
At Stable Diffusion 1.5's shapes it is {large["gflop"]:.1f} GFLOP and {100 * large["of_a_guided_step"]:.2f} % of a step."""


def what_it_does_not_do() -> str:
    """Limits, with figures."""
    told = [path.stem for pattern in ("*attacks_*.json", "amplified.json", "unfamiliar.json") for path in RESULTS.glob(pattern)]
    return "\n".join(f"- {sentence}" for sentence in limits({name: read_result(name) for name in sorted(told)}))


def _worst(concept: str) -> str:
    counted: dict[str, dict[str, Any]] = {
        family: counted_row(row) for family, row in read_result(f"attacks_{concept}")["families"].items()
    }
    tried = {family: row["asr"] for family, row in counted.items() if row["is_attack"]}
    family = max(tried, key=lambda own: tried[own]["share"])
    return f"{family}: {hits_of(tried[family])} get through"


def _false_alarms() -> str:
    envelope, unfamiliar = read_result("envelope"), read_result("unfamiliar")["files"]
    steps = list(envelope["by"]["steps"])
    rows = {
        f"of the model's own kind, {steps[0]} to {steps[-1]} steps, {len(envelope['by']['scheduler'])} samplers": envelope[
            "fired"
        ],
        **{
            f"{title}, {steps} steps": row["fired_without_a_concept"]
            for name, title in (("everyday", "everyday prompts as users write them"), ("foreign", "foreign domains"))
            for steps, row in unfamiliar[name].items()
        },
    }
    return "\n".join(f"| {title} | {hits_of(fired)} |" for title, fired in rows.items())
