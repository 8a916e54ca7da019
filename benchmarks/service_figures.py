"""What the figures say of the service: batching, equality in company, faults, cases, and load over an hour."""

from __future__ import annotations

from statistics import median
from typing import Any

from benchmarks.markdown import percent, read_result


def equality() -> str:
    result = read_result("equality")
    table = "\n".join(
        f"| {row['threads']} | {row['patterns']} | {row['equal']} | {row['steps']} | {row['cancelled']} "
        f"| {row['rows'] / row['turns']:.1f} |"
        for row in result["rows"]
    )
    return f"""**Is a picture the same alone and in company?** Patterns of arrivals at random: 1 to 12 requests of 1 to 50 steps, every
sampler, guided and not, three policies, some cancelled. Each picture's last latent, scores, firings, cooldowns and mask are
compared with its lone run; one that differed would have ended the command. (`python -m benchmarks.equality`)

| threads | patterns | pictures equal to the bit | of steps | cancelled | rows in a step, on average |
| --- | --- | --- | --- | --- | --- |
{table}"""


def batching() -> str:
    result = read_result("batching")
    table = "\n".join(
        f"| {'all at once' if row['load'] is None else format(row['load'], 'g')} | {row['way']} | {row['a_second']:.2f} "
        f"| {row['p50']:.2f} s | {row['p95']:.2f} s | {percent(row['in_time'])} |"
        for row in result["rows"]
    )
    alone, own = result["lone_seconds"]["one at a time"], result["lone_seconds"]["batcher"]
    admission = result["admission"]
    refused = admission["refused_after_ms"]
    return f"""**What does batching by the step bring?** {result["rounds"]} traces of {result["requests"]} requests of 4 to 50 steps, which arrive by a Poisson process at
shares of what is drawn one at a time; {result["environment"]["machine"]}. A request that comes when nobody else is there takes
{own / alone:.2f} times what it takes without a batcher. (`python -m benchmarks.batching`)

| load | way | pictures a second | median | 95 % within | within 3x what it takes alone |
| --- | --- | --- | --- | --- | --- |
{table}

At {admission["overload"]:g} times what the batcher draws, with {admission["patience_s"]:g} s of patience, it admits {admission["admitted"]} of
{admission["requests"]}, of which {admission["late"]} are late; {percent(admission["within_20_percent"])} end within 20 % of what was predicted. A refusal comes
after {refused["median"]:.1f} ms ({refused["most"]:.1f} at most)."""


def service() -> str:
    result = read_result("service")
    a_second, p95 = result["a_second"], result["p95_at_half_load"]
    return f"""**What does the service cost beside its batcher?** One trace of {result["requests"]} requests, handed to the batcher, and sent over HTTP
with policy and audit: {a_second["batcher"]:.2f} and {a_second["service"]:.2f} pictures a second; at half of that 95 % are answered within
{p95["batcher"]:.3f} and {p95["service"]:.3f} s. From the command `saferedir serve` to the first picture: {median(result["first_picture_s"]):.2f} s, the median of
{len(result["first_picture_s"])} starts. (`python -m benchmarks.serving.against_batcher`)"""


def faults() -> str:
    result = read_result("faults")
    table = "\n".join(
        f"| {row['injected']} | {row['came_back']} | {row['recovery']} | {row['pictures']} | {row['unprotected']} | {row['gaps']} |"
        for row in result["rows"]
    )
    shown = read_result("partial_images")
    return f"""**What becomes of it when something breaks?** Pictures: of all that were asked for in a row, those that came back; unprotected:
of these, such as were not redirected; gaps: such as have no record, and faults of the chain. Of {shown["asked"]} pictures in progress
of prompts that ask for a concept {shown["sent"]} were sent; the judge finds the concept in {len(shown["found"])} of them.
(`python -m benchmarks.serving.faults`, `... partial_images`)

| injected | what came back | recovery | pictures | unprotected | gaps |
| --- | --- | --- | --- | --- | --- |
{table}"""


def endurance() -> str:
    cases, soak, replicas = (read_result(name) for name in ("contract", "soak", "replicas"))
    memory, files = soak["memory_mb"], soak["descriptors"]
    return f"""**Does it keep its word?** Of {cases["cases"]} cases that schemathesis made of its description {_bad(cases["statuses"])} were answered
with 5xx, and {"none broke" if cases["passed"] else "some broke"} the description (`python -m benchmarks.serving.contract`). Under {soak["seconds"] / 60:.0f} minutes of mixed load
{sum(soak["asked"].values())} pictures that were asked for came to {sum(soak["recorded"].values())} records{_refused(soak)}, and {len(soak["problems"])}
problems of the chain; memory went from {memory["first"]:.0f} to {memory["last"]:.0f} MB ({memory["most"]:.0f} at most), open files from {files["first"]} to
{files["last"]} (`python -m benchmarks.serving.soak`). Of two replicas under Ray one was killed under {replicas["requests"]} requests: {replicas["answered_once"]} were
answered once, {replicas["recorded"]} recorded (`python -m benchmarks.serving.replicas`)."""


def _bad(statuses: dict[str, int]) -> int:
    return sum(count for status, count in statuses.items() if status.startswith("5"))


def _refused(soak: dict[str, Any]) -> str:
    full = soak["answered"].get("queue_full", 0)
    return f" ({full} more were refused, which leaves none)" if full else ""
