"""Every error the product raises on purpose. The command line turns each into one line and its exit code.

SafeRedirError
├── BundleError                the bundle cannot be used                                  exit 3
│   ├── BundleMissingFileError     a file it lists is not there
│   ├── BundleAlteredError         a file's hash, or the manifest itself, is wrong
│   ├── BundleSchemaError          made by a newer version
│   └── ExportError                a graph cannot be exported
├── RequestError               what was asked for or given cannot be used                 exit 2
├── BackendError               the execution backend cannot be had                        exit 4
│   ├── MissingDependencyError     a package is missing; the message names the extra
│   ├── ProviderMismatchError      another provider than the one asked for
│   └── PlanError                  an engine cannot be compiled, or its plan not be had
├── SafetyError                safety failed closed: no picture leaves                    exit 5
│   ├── SafetyMissingError         no safety engine
│   ├── SafetyMismatchError        it was made for another model
│   ├── SafetyEngineError          it raised
│   ├── UnresponsiveError          an engine did not come back
│   └── NonFiniteError             NaN or infinity in latent, score, embedding or picture
├── TrainingError              training cannot begin or go on                             exit 2
├── OutputError                the picture or record cannot be written                    exit 6
│   └── AuditError                 the audit cannot be written or read; no picture leaves
├── VerificationError          an engine does not equal its reference                     exit 7
├── BusyError                  not drawn for want of time                                 exit 8
│   ├── QueueFullError             too many wait already
│   └── DeadlineError              its deadline passed
├── BlockedError               the operator's policy refuses what was asked for           exit 9
└── CancelledError             the caller cancelled                                       exit 130
"""

from __future__ import annotations

from collections.abc import Sequence


class SafeRedirError(Exception):
    """Root of the tree."""

    exit_code = 1


class BundleError(SafeRedirError):
    """The bundle cannot be used."""

    exit_code = 3


class BundleMissingFileError(BundleError):
    """A file that the bundle needs is not there."""


class BundleAlteredError(BundleError):
    """A file is not the one that the manifest describes, or the manifest is malformed."""


class BundleSchemaError(BundleError):
    """The bundle's schema is newer than this version reads."""


class ExportError(BundleError):
    """A graph cannot be exported, or is not what the bundle needs."""


class RequestError(SafeRedirError):
    """What was asked for or given cannot be used; the message names the field or file, the value and what is allowed."""

    exit_code = 2


class BackendError(SafeRedirError):
    """The execution backend cannot be had."""

    exit_code = 4


class MissingDependencyError(BackendError):
    """A package is missing; the message names the extra that brings it."""


class ProviderMismatchError(BackendError):
    """The session runs on another provider than the one asked for."""


class PlanError(BackendError):
    """An engine cannot be compiled ahead of time, or its plan cannot be had."""


class SafetyError(SafeRedirError):
    """Safety failed closed: no picture leaves."""

    exit_code = 5


class SafetyMissingError(SafetyError):
    """There is no safety engine."""


class SafetyMismatchError(SafetyError):
    """The safety engine was made for another model."""


class SafetyEngineError(SafetyError):
    """The safety engine raised."""


class NonFiniteError(SafetyError):
    """NaN or infinity in a latent, score, embedding or picture."""


class UnresponsiveError(SafetyError):
    """An engine did not come back from a step."""


class BlockedError(SafeRedirError):
    """The operator's policy refuses what was asked for: a concept fired that it blocks."""

    exit_code = 9

    def __init__(self, concepts: Sequence[str], steps: int) -> None:
        """`concepts` are those that fired, in so many `steps`."""
        super().__init__(f"refused by the policy: {', '.join(concepts)} fired within {steps} steps")
        self.concepts = tuple(concepts)


class TrainingError(SafeRedirError):
    """Training cannot begin or go on; what was trained so far stays."""

    exit_code = 2


class OutputError(SafeRedirError):
    """The picture or record cannot be written."""

    exit_code = 6


class AuditError(OutputError):
    """The audit cannot be written or read; no picture leaves without its record."""


class VerificationError(SafeRedirError):
    """An engine does not equal its reference within the stated tolerance."""

    exit_code = 7


class CancelledError(SafeRedirError):
    """The caller cancelled."""

    exit_code = 130


class BusyError(SafeRedirError):
    """The picture was not drawn for want of time; the same request may be drawn later."""

    exit_code = 8


class QueueFullError(BusyError):
    """Too many pictures wait already."""

    def __init__(self, message: str, retry_after: float) -> None:
        """`retry_after` is in how many seconds it is worth trying again."""
        super().__init__(message)
        self.retry_after = retry_after


class DeadlineError(BusyError):
    """Its deadline passed before the picture was drawn."""
