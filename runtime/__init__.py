"""The lean runtime: draws protected pictures from a bundle, without PyTorch."""

import warnings

from saferedir.engines.errors import (
    BackendError,
    BundleError,
    CancelledError,
    RequestError,
    SafeRedirError,
    SafetyError,
)
from saferedir.runtime.installation import installation_problem
from saferedir.runtime.pipeline import Generation, Pipeline
from saferedir.runtime.policy import SafetyPolicy, Tightening
from saferedir.runtime.record import LookedFor, SafetyRecord, StepRecord

if _problem := installation_problem():
    warnings.warn(_problem, stacklevel=2)

__all__ = [
    "BackendError",
    "BundleError",
    "CancelledError",
    "Generation",
    "LookedFor",
    "Pipeline",
    "RequestError",
    "SafeRedirError",
    "SafetyError",
    "SafetyPolicy",
    "SafetyRecord",
    "StepRecord",
    "Tightening",
]
