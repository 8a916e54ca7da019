"""What a service counts, for Prometheus; and how far its scores have moved from those of the calibration."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

#: Pictures that drift is told of, and how many of them at least.
DRIFT_PICTURES, FEWEST_PICTURES = 1000, 100
#: Least share of a bin: one that holds nothing is not infinitely far.
LEAST_SHARE = 1e-4
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Drift:
    """The population stability index of the latest pictures' highest scores, by the deciles of the calibration's.

    0 where a tenth of them lies in each; 0.1 to 0.25 is usually called a small change, more a large one.
    """

    def __init__(self, deciles: Sequence[float]) -> None:
        self._edges = np.asarray(deciles)
        self._bins: deque[int] = deque(maxlen=DRIFT_PICTURES)

    def seen(self, highest: float) -> None:
        """Count a picture by its highest score."""
        if len(self._edges):
            self._bins.append(int(np.searchsorted(self._edges, highest, side="right")))

    @property
    def index(self) -> float:
        """NaN until there are enough pictures, and where the bundle states no deciles."""
        if len(self._bins) < FEWEST_PICTURES:
            return float("nan")
        bins = len(self._edges) + 1
        share = np.maximum(np.bincount(list(self._bins), minlength=bins) / len(self._bins), LEAST_SHARE)
        return float(np.sum((share - 1 / bins) * np.log(share * bins)))


class Metrics:
    """Of one service, in a registry of its own."""

    def __init__(
        self, drift: Drift, waiting: Callable[[], int], running: Callable[[], int], bad_policy: Callable[[], bool]
    ) -> None:
        self._registry = CollectorRegistry()
        own = self._registry
        self.requests = Counter("saferedir_requests", "Answers, by status.", ["status"], registry=own)
        self.request_seconds = _seconds("request_seconds", "Until an answer is complete.", own)
        self.pictures = Counter("saferedir_pictures", "Pictures, by outcome.", ["outcome"], registry=own)
        self.concepts = Counter(
            "saferedir_concepts", "Pictures, by a concept that was seen and what was done.", ["concept", "action"], registry=own
        )
        self.faults = Counter(
            "saferedir_safety_faults", "Failures of the safety or of its record, by kind.", ["kind"], registry=own
        )
        self.steps = Counter("saferedir_steps", "Calls of a step graph.", registry=own)
        self.rows = Counter("saferedir_step_rows", "Pictures in them; over steps it is the batch's fill.", registry=own)
        self.step_seconds = _seconds("step_seconds", "Of a call of a step graph.", own)
        self.wait_seconds = _seconds("queue_wait_seconds", "From a request to its first step.", own)
        self.decode_seconds = _seconds("decode_seconds", "From the last step to the picture.", own)
        self.audit_seconds = _seconds("audit_seconds", "Of writing to the audit.", own)
        for name, what, value in (
            ("pictures_waiting", "Pictures that wait for a row.", waiting),
            ("pictures_running", "Pictures under way.", running),
            ("policy_refused", "Whether the policy's file as it is now could not be taken.", bad_policy),
            ("score_drift", "Population stability index of the scores against the calibration's.", lambda: drift.index),
        ):
            Gauge(f"saferedir_{name}", what, registry=own).set_function(value)

    def turn(self, rows: int, seconds: float) -> None:
        """Count one call of a step graph."""
        self.steps.inc()
        self.rows.inc(rows)
        self.step_seconds.observe(seconds)

    def text(self) -> bytes:
        """In Prometheus's text format."""
        return generate_latest(self._registry)


def _seconds(name: str, what: str, registry: CollectorRegistry) -> Histogram:
    return Histogram(f"saferedir_{name}", what, buckets=SECONDS, registry=registry)
