"""What `protect` hands out: the safety and its policy while it is open, and the record of the latest call."""

from __future__ import annotations

import copy
import weakref
from contextvars import ContextVar

import torch

from saferedir.engines.errors import SafetyError
from saferedir_torch.eager_policy import EagerPolicy
from saferedir_torch.safety_module import SafetyModule
from saferedir_torch.safety_run import CallRecord, SafetyRun


class Guard:
    """A safety module under a policy. `last` is the record of the latest call that this thread or task made."""

    def __init__(self, safety: SafetyModule, policy: EagerPolicy) -> None:
        """
        Raises:
            RequestError: a value of the policy is out of range.
        """
        self.safety, self.choices = safety, policy.choices(safety.config)
        self._on: dict[torch.device, SafetyModule] = {}

    @property
    def last(self) -> CallRecord:
        """The record of the latest call. The result of a call holds the same one as `safety`, for whoever is elsewhere.

        Raises:
            SafetyError: this thread or task drew nothing under this guard.
        """
        for guard, record in _latest.get():
            if guard() is self:
                return record
        raise SafetyError("nothing was drawn yet under this guard by this thread or task; a result's `safety` is its record")

    def run(self, requests: int) -> SafetyRun:
        """The safety of a call that draws `requests` pictures."""
        return SafetyRun(self.safety.config, self._module_on, self.choices, requests)

    def _module_on(self, device: torch.device) -> SafetyModule:
        """The module on `device` in fp32; the one that was given stays where it is."""
        if device not in self._on:
            own = next(self.safety.parameters())
            stays = own.device == device and own.dtype == torch.float32
            self._on[device] = self.safety if stays else copy.deepcopy(self.safety).to(device, torch.float32)
        return self._on[device]

    def finished(self, record: CallRecord) -> None:
        """Keep `record` as the latest of this thread or task."""
        others = [(guard, other) for guard, other in _latest.get() if guard() not in (None, self)]
        _latest.set((*others, (weakref.ref(self), record)))


#: The latest record of each guard in this thread or task; guards that are gone leave theirs.
_latest: ContextVar[tuple[tuple[weakref.ref[Guard], CallRecord], ...]] = ContextVar("latest", default=())
