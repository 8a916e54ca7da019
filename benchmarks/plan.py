"""How long the evaluation takes, by table: what each draws, at the cost of a step on this machine."""

from __future__ import annotations

import time

from benchmarks.drawing import USUAL
from benchmarks.tables import ablation, added, amplified, attacks, envelope, forgetting, interference, settings, unfamiliar
from benchmarks.tables.forgetting import Size
from saferedir.runtime import Pipeline
from saferedir_torch.world.prompts import CONCEPTS

#: Seconds of both cores of the machine that tables were sized on, for a guided step of one picture.
STEP_SECONDS = 0.015
#: Steps of a full batch that a plan measures, and how often: the shortest counts.
MEASURED, TIMES = 4, 4
#: Of the attacks; 25 is the usual number.
ATTACKED_AT = (USUAL.steps, 12)


def picture_steps() -> dict[str, float]:
    """Table -> guided steps of one picture that `everything` draws for it. What several tables need is counted in the first."""
    usual, concepts = USUAL.steps, len(CONCEPTS)
    return {
        "forgetting": concepts * usual * forgetting.pictures(Size(), by_picture=True),
        "settings": settings.picture_steps(settings.Size()),
        "envelope": envelope.picture_steps(envelope.Size()),
        "unfamiliar": unfamiliar.picture_steps(unfamiliar.Size()),
        **{f"attacks, {steps} steps": concepts * steps * attacks.pictures(attacks.Size()) for steps in ATTACKED_AT},
        "amplified": amplified.picture_steps(amplified.Size()),
        "interference": usual * interference.pictures(interference.FULL),
        "added": usual * added.pictures(added.FULL_SIZE, added.FULL),
        "ablation": ablation.picture_steps(ablation.Size()),
    }


def step_seconds() -> float:
    """What a guided step of one picture takes here, in a full batch."""
    pipeline = Pipeline.from_bundle()
    prompts = ["a cat on blue"] * pipeline.manifest.max_batch
    pipeline(prompts, num_inference_steps=MEASURED)
    taken = []
    for _ in range(TIMES):
        started = time.perf_counter()
        pipeline(prompts, num_inference_steps=MEASURED)
        taken.append(time.perf_counter() - started)
    return min(taken) / (MEASURED * len(prompts))


def plan(seconds: float) -> str:
    """Minutes by table at `seconds` a step, and in all."""
    rows = {table: steps * seconds / 60 for table, steps in picture_steps().items()}
    rows["all"] = sum(rows.values())
    lines = [f"{table:24}{minutes:8.1f} min" for table, minutes in rows.items()]
    return "\n".join([f"{1000 * seconds:.1f} ms a guided step of one picture", *lines])
