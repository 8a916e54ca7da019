"""Which protection a pipeline's call is under, and what a call does besides drawing.

A protected pipeline is given a class of its own, made of the one it had, which opens a call around that one's `__call__`.
So its attributes stay as they are, copies of it (`copy.copy`, `from_pipe` of its own class) are protected like it, and
leaving gives it back the class it had.
"""

from __future__ import annotations

import copy
import functools
import inspect
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import Tensor, nn

from saferedir.engines.errors import SafetyError
from saferedir.engines.plain_letters import in_plain_letters
from saferedir_torch.estimate import NoiseLevels
from saferedir_torch.fit import check_match
from saferedir_torch.guard import Guard
from saferedir_torch.network_hooks import current_call, networks_of, watched
from saferedir_torch.safety_run import CallRecord, Guidance, SafetyRun, check_embeddings
from saferedir_torch.shared_tokenizer import taking_turns

#: Pipelines whose every step calls each network that is given the prompt once.
KNOWN_PIPELINES = (
    "StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline",
    "StableDiffusionControlNetPipeline", "StableDiffusionControlNetImg2ImgPipeline", "StableDiffusionControlNetInpaintPipeline",
    "StableDiffusionAdapterPipeline", "LatentConsistencyModelPipeline", "LatentConsistencyModelImg2ImgPipeline",
)  # fmt: skip

_lock = threading.Lock()
_locks: weakref.WeakKeyDictionary[Any, threading.RLock] = weakref.WeakKeyDictionary()
_protections: weakref.WeakKeyDictionary[Any, _Protection] = weakref.WeakKeyDictionary()
#: Guards that this thread or task entered and has not left, the innermost last.
_entered: ContextVar[tuple[Guard, ...]] = ContextVar("entered", default=())


class DrawnTuple(tuple[Any, ...]):
    """What a pipeline returns with `return_dict=False`, and the record beside it."""

    safety: CallRecord


class _PipelineCall:
    """One call of a protected pipeline, whose networks ask it."""

    def __init__(self, pipeline: Any, run: SafetyRun, networks: tuple[nn.Module, ...]) -> None:
        self.pipeline, self.run, self.networks = pipeline, run, networks

    def before(self, network: nn.Module, sample: Tensor, timestep: Tensor | float, embeds: Tensor) -> Tensor:
        if networks_of(self.pipeline) != self.networks:
            raise SafetyError("a network was replaced within a call, which protection cannot follow")
        levels, scale = NoiseLevels(self.pipeline.scheduler), self.pipeline.guidance_scale
        return self.run.embeddings(sample, timestep, embeds, levels, scale, denoises=network is self.networks[-1])

    def after(self, network: nn.Module, sample: Tensor, timestep: Tensor | float, output: Any) -> None:
        if network is self.networks[-1]:
            prediction = output[0] if isinstance(output, tuple) else output.sample
            guidance = Guidance(self.pipeline.guidance_scale, getattr(self.pipeline, "guidance_rescale", 0.0))
            self.run.predicted(sample, timestep, prediction, NoiseLevels(self.pipeline.scheduler), guidance)

    def finish(self, output: Any) -> Any:
        """`output` with the record beside it.

        Raises:
            SafetyError: a step was taken that the safety did not see.
        """
        steps = getattr(self.pipeline, "_num_timesteps", max(1, self.run.steps))
        if self.run.steps != steps and not getattr(self.pipeline, "_interrupt", False):
            raise SafetyError(f"the safety saw {self.run.steps} of {steps} steps; no picture is handed out")
        if isinstance(output, tuple):
            output = DrawnTuple(output)
        output.safety = self.run.record
        return output


class _Protection:
    """The guards that are open on one pipeline, and the class that they give it."""

    def __init__(self, before: type) -> None:
        self.before = before
        self.guards: list[Guard] = []
        self.protected = _protected_class(getattr(before, "_unprotected", before), self)

    def guard(self) -> Guard:
        """The guard of a call that begins now: the innermost of this thread or task, else the first of all, which are alike.

        Raises:
            SafetyError: there is none, or they are not alike.
        """
        if own := [guard for guard in _entered.get() if guard in self.guards]:
            return own[-1]
        if not self.guards:
            raise SafetyError("the protection that this copy of a pipeline was made under has ended; copy the pipeline anew")
        first, *others = self.guards
        if any((guard.safety, guard.choices) != (first.safety, first.choices) for guard in others):
            raise SafetyError(
                f"{len(self.guards)} protections of this pipeline are open that differ, none of them entered by this thread or "
                "task; enter one here"
            )
        return first


@contextmanager
def guarded(pipeline: Any, guard: Guard) -> Iterator[None]:
    """Put the calls of `pipeline` under `guard` while the context lasts, and give it back its class when the last one ends."""
    with _lock:
        protection = _protections.get(pipeline)
        if protection is None:
            protection = _protections[pipeline] = _Protection(type(pipeline))
            pipeline.__class__ = protection.protected
        protection.guards.append(guard)
    _entered.set((*_entered.get(), guard))
    try:
        yield
    finally:
        _entered.set(tuple(other for other in _entered.get() if other is not guard))
        with _lock:
            protection.guards.remove(guard)
            if not protection.guards:
                pipeline.__class__ = protection.before
                del _protections[pipeline]


def check_kind(pipeline: Any) -> None:
    """Raise `SafetyError` unless it is known how `pipeline` calls its networks."""
    theirs = {kind.__name__ for kind in type(pipeline).__mro__ if kind.__module__.startswith("diffusers.")}
    if theirs.isdisjoint(KNOWN_PIPELINES):
        raise SafetyError(f"{type(pipeline).__name__} cannot be protected; expected one of {', '.join(KNOWN_PIPELINES)}")


def _protected_class(plain: Any, protection: _Protection) -> type:
    @functools.wraps(plain.__call__)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return _draw(self, plain.__call__, protection.guard(), args, kwargs)

    @functools.wraps(plain.encode_prompt)
    def encode_prompt(self: Any, prompt: Any, *args: Any, **kwargs: Any) -> Any:
        return plain.encode_prompt(self, _in_plain_letters(prompt), *args, **kwargs)

    namespace = {
        "__call__": call, "encode_prompt": encode_prompt, "_unprotected": plain,
        "__module__": plain.__module__, "__qualname__": plain.__qualname__, "__doc__": plain.__doc__,
    }  # fmt: skip
    return type(plain.__name__, (plain,), namespace)


def _draw(pipeline: Any, plain_call: Callable[..., Any], guard: Guard, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What `plain_call` returns for these arguments, drawn under `guard`, with the record beside it."""
    bound = inspect.signature(plain_call).bind(pipeline, *args, **kwargs)
    asked = bound.arguments
    if asked.get("clip_skip"):
        raise SafetyError("clip_skip gives other embeddings than the safety module reads; leave it out")
    prompt, embeds = asked.get("prompt"), asked.get("prompt_embeds")
    if embeds is not None:
        check_embeddings(guard.safety.config, embeds, "prompt_embeds")
    if prompt is not None:
        asked["prompt"] = _in_plain_letters(prompt)
    prompts = len(prompt) if isinstance(prompt, list) else 1 if embeds is None else len(embeds)
    run = guard.run(prompts * (asked.get("num_images_per_prompt") or 1))
    # A pipeline object holds what one call needs, its guidance for one, so that its own calls take turns.
    with _turns(pipeline), watched(networks_of(pipeline)), taking_turns(pipeline.tokenizer), _own_scheduler(pipeline):
        check_match(pipeline, guard.safety)
        call = _PipelineCall(pipeline, run, networks_of(pipeline))
        token = current_call.set(call)
        try:
            output = call.finish(plain_call(*bound.args, **bound.kwargs))
        finally:
            current_call.reset(token)
            call.networks = ()  # a task that was begun within the call may hold on to it
    guard.finished(run.record)
    return output


@contextmanager
def _own_scheduler(pipeline: Any) -> Iterator[None]:
    """Give `pipeline` a copy of its scheduler, which counts steps, so that no other pipeline's call disturbs it."""
    shared = pipeline.scheduler
    if any(inspect.isroutine(value) for value in vars(shared).values()):  # a method that somebody replaced knows no copy
        yield
        return
    own = copy.copy(shared)
    vars(own).update({name: copy.copy(value) for name, value in vars(own).items() if isinstance(value, list | dict)})
    vars(pipeline)["scheduler"] = own
    try:
        yield
    finally:
        if pipeline.scheduler is own:  # else somebody assigned another meanwhile
            vars(pipeline)["scheduler"] = shared


def _turns(pipeline: Any) -> threading.RLock:
    """The lock of those who call `pipeline`."""
    with _lock:
        return _locks.setdefault(pipeline, threading.RLock())


def _in_plain_letters(prompt: Any) -> Any:
    """As a pipeline takes prompts; what is none is for the pipeline to refuse."""
    if isinstance(prompt, list):
        return [in_plain_letters(text) if isinstance(text, str) else text for text in prompt]
    return in_plain_letters(prompt) if isinstance(prompt, str) else prompt
