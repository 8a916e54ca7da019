"""What a policy that is to come would change: prompts drawn once, undisturbed, and judged by both."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from saferedir.runtime.pipeline import Pipeline
from saferedir.runtime.serve.policies import Policies
from saferedir.runtime.ticket import StepCallback


def differences(
    before: Path, after: Path, prompts: Sequence[str], *, bundle: str, tenant: str, seed: int, steps: int,
    on_step: StepCallback | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """One row a prompt and concept of which the two policies decide differently: prompt, concept, before and after."""
    pipeline = Pipeline.from_bundle(bundle)
    policies = [Policies(pipeline.manifest.safety, path).of(tenant) for path in (before, after)]
    watched = Policies(pipeline.manifest.safety).of("")
    plan = pipeline.plan(list(prompts), seed=seed, num_inference_steps=steps, policy=watched.only_observing().engine)
    rows: list[dict[str, Any]] = []
    for prompt, drawn in zip(prompts, pipeline.draw(plan, on_step), strict=True):
        first, second = (policy.decisions(drawn.score) for policy in policies)
        rows += [
            {"prompt": prompt, "concept": name, "before": first.get(name), "after": second.get(name)}
            for name in watched.actions
            if first.get(name) != second.get(name)
        ]
    return rows
