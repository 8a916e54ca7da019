"""What the figures say of the engines: what they cost, and that they equal their reference."""

from __future__ import annotations

from benchmarks.markdown import hits_of, percent, read_result, share_of
from benchmarks.report import RESULTS

#: The runtime's on the CPU, and on a card where one was there.
SPEEDS = ("speed", "speed_ort-cuda")


def cost() -> str:
    said, rows = [], []
    for name in SPEEDS:
        if not (RESULTS / f"{name}.json").exists():
            continue
        result = read_result(name)
        shares = result["safety_share_of_step"]
        backend = "ort-cpu" if name == "speed" else "ort-cuda"
        said.append(
            f"`{backend}`: {result['environment']['machine']}; safety's share of a step on this very small UNet is "
            f"{share_of(shares['1'])} at batch 1, {share_of(shares['8'])} at batch 8, by pairs of drawings that follow each other."
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


def safety_cost() -> str:
    result = read_result("safety_cost")
    table = "\n".join(
        f"| `{row['engine']}` | {row['gflop']:.2f} | {1000 * row['seconds']:.1f} ms | {row['of_published']:.3f} "
        f"| {100 * row['of_a_guided_step']:.2f} % |"
        for row in result["rows"]
    )
    return f"""**And at Stable Diffusion 1.5's shapes?** {result["environment"]["machine"]}, one request, fp32. `safety` is the part of a step
that is the safety's, in ONNX Runtime; the UNet is of the true size with random weights, in eager PyTorch.
(`python -m benchmarks.safety_cost --unet`)

| engine | GFLOP | time | of the published network's | of the UNet's guided step |
| --- | --- | --- | --- | --- |
{table}"""


def optimisers() -> str:
    result = read_result("optimisers")
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


def parity() -> str:
    result = read_result("parity")
    engines: dict[str, float] = {}
    for row in result["engines"]:
        engines[row["engine"]] = max(engines.get(row["engine"], 0.0), row["worst"])
    listed = ", ".join(f"`{name}` {worst:.1e}" for name, worst in engines.items())
    equal, fired, twice = (result[key] for key in ("decisions_equal", "images_that_fired", "images_that_fired_twice_or_more"))
    near = 100 * result["pixel_values_within_1_of_255"]
    return f"""**Does the deployed engine equal its reference?** Worst absolute difference from eager PyTorch per engine:
{listed}. Over {result["images"]} pictures ({fired["hits"]} fired, {twice["hits"]} twice or more) {equal["hits"]} of
{equal["of"]} decisions are equal, {near:.3f} % of pixel values are within 1/255. (`make parity`)"""


def families() -> str:
    rows = []
    measured = [name for name in ("families", "families_full") if (RESULTS / f"{name}.json").exists()]
    for row in (row for name in measured for row in read_result(name)["rows"]):
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


def precision() -> str:
    result = read_result("precision")
    rows = []
    for row in result["rows"]:
        fsr = ", ".join(percent(own["share"]) for own in row["fsr"].values())
        largest = ", ".join(
            f"{100 * tensors[0]['of_largest']:.1g} % (`{engine}`: {tensors[0]['tensor']})"
            for engine, tensors in row["largest"].items()
            if engine != "text_encoder"
        )
        psnr = ""
        if row["way"] != "fp32":
            psnr = f"{row['worst_psnr']:.1f}, {row['median_psnr']:.1f} dB, {percent(row['near']['share'])}"
        rows.append(
            f"| {row['way']} | {hits_of(row['decisions_equal'])} | {psnr} | {fsr} | {row['weight_bytes'] / 1e6:.1f} MB | {largest} |"
        )
    table = "\n".join(rows)
    return f"""**What does lower precision change?** {result["pictures"]} pictures, {result["benign"]} of them benign, the others with
held-out names, {result["steps"]} steps each, every tensor of the graphs rounded to its type; int8 rounds weights alone, and
saves room on disk alone. The text encoder's largest number is its causal mask, which is the lowest that the type holds. (`python -m benchmarks.precision`)

| | decisions as in fp32 | PSNR to fp32: worst, median, pictures of 40 dB and more | FSR of church, ink, weapons | weights | largest magnitude, of what its type holds |
| --- | --- | --- | --- | --- | --- |
{table}"""
