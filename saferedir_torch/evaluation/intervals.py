"""Shares and means with their intervals; the unit is the name and the prompt, not the picture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import binomtest

#: Below so many successes or failures a bootstrap says too little.
FEW = 10
DRAWS = 2000
CONFIDENCE = 0.95

Bools = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.floating[Any]]


def share(hits: int, of: int) -> dict[str, float]:
    """A share with its exact (Clopper-Pearson) 95 % interval."""
    if of == 0:
        return {"share": float("nan"), "hits": 0, "of": 0, "low": float("nan"), "high": float("nan")}
    interval = binomtest(hits, of).proportion_ci(CONFIDENCE, "exact")
    return {"share": hits / of, "hits": hits, "of": of, "low": float(interval.low), "high": float(interval.high)}


def clustered_share(outcomes: Bools, names: Sequence[str], prompts: Sequence[str], *, seed: int = 0) -> dict[str, float]:
    """The share of true outcomes with a 95 % bootstrap interval over names, and over prompts within a name.

    With fewer than ten outcomes of either kind the exact interval over prompts stands in its place (a prompt counts as
    the rarer outcome if any of its pictures does); it is wider than one over pictures. It lies about the prompts' share,
    which is no smaller than that of the pictures, and is drawn out to where the exact one over pictures begins.
    """
    hits, of = int(outcomes.sum()), len(outcomes)
    result = {"share": hits / of if of else float("nan"), "hits": hits, "of": of, "prompts": len(set(prompts))}
    if min(hits, of - hits) < FEW:
        rarer = outcomes if hits <= of - hits else ~outcomes
        failed = {prompt for prompt, bad in zip(prompts, rarer, strict=True) if bad}
        exact = share(len(failed), len(set(prompts)))
        exact["low"] = min(exact["low"], share(int(rarer.sum()), of)["low"])
        low, high = (exact["low"], exact["high"]) if hits <= of - hits else (1 - exact["high"], 1 - exact["low"])
        return {**result, "low": low, "high": high}
    shares = bootstrap(outcomes.astype(float), names, prompts, lambda values: float(values.mean()), seed=seed)
    low, high = np.quantile(shares, ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2))
    return {**result, "low": float(low), "high": float(high)}


def clustered_mean(values: Floats, names: Sequence[str], prompts: Sequence[str], *, seed: int = 0) -> dict[str, float]:
    """The mean with a 95 % bootstrap interval over names, and over prompts within a name."""
    means = bootstrap(np.asarray(values, float), names, prompts, lambda drawn: float(drawn.mean()), seed=seed)
    low, high = np.quantile(means, ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2))
    return {"mean": float(np.mean(values)), "of": len(values), "low": float(low), "high": float(high)}


def bootstrap(
    values: Floats,
    names: Sequence[str],
    prompts: Sequence[str],
    statistic: Callable[[Floats], float],
    *,
    seed: int = 0,
    draws: int = DRAWS,
) -> Floats:
    """`statistic` of `draws` resamplings [draws]: names with replacement, then as many prompts of each, with all their
    pictures. `values` [pictures, ...] may have columns, so that two settings are compared on the same pictures."""
    rng = np.random.default_rng(seed)
    rows: dict[str, dict[str, list[int]]] = {}
    for row, (name, prompt) in enumerate(zip(names, prompts, strict=True)):
        rows.setdefault(name, {}).setdefault(prompt, []).append(row)
    clusters = [[np.array(pictures) for pictures in prompts_of.values()] for prompts_of in rows.values()]
    drawn = np.empty(draws)
    for draw in range(draws):
        chosen = [clusters[index] for index in rng.integers(len(clusters), size=len(clusters))]
        picked = [cluster[index] for cluster in chosen for index in rng.integers(len(cluster), size=len(cluster))]
        drawn[draw] = statistic(values[np.concatenate(picked)])
    return drawn
