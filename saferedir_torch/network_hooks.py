"""Which call of which pipeline a network's call belongs to, and the hooks that ask it.

A network (UNet, ControlNet) is often shared by several pipelines, threads and tasks. It is hooked once, for as long as anybody
needs it, and the call in progress is a fact of the thread or task. A network that is called outside of any is not run: what
called it is a pipeline that shares the network and is not protected itself.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from saferedir.engines.errors import SafetyError

#: What a network may be given. Anything else could say what to draw past the prompt.
UNDERSTOOD = frozenset({
    "sample", "timestep", "encoder_hidden_states", "timestep_cond", "cross_attention_kwargs", "return_dict",
    "down_block_additional_residuals", "mid_block_additional_residual", "down_intrablock_additional_residuals",
    "controlnet_cond", "conditioning_scale", "guess_mode",
})  # fmt: skip
#: In the order in which they are given without their names.
POSITIONAL = ("sample", "timestep", "encoder_hidden_states")
#: Of `cross_attention_kwargs`: the strength of LoRAs.
UNDERSTOOD_BY_ATTENTION = frozenset({"scale"})
REASONS = {
    "added_cond_kwargs": "an IP-Adapter's picture is a second prompt, which the safety does not read",
    "class_labels": "a class is a second prompt, which the safety does not read",
}


class Call(Protocol):
    """A call of a pipeline that is in progress."""

    #: What it calls.
    networks: tuple[nn.Module, ...]

    def before(self, network: nn.Module, sample: Tensor, timestep: Tensor | float, embeds: Tensor) -> Tensor:
        """The embeddings that `network` is to be given in place of `embeds`."""
        ...

    def after(self, network: nn.Module, sample: Tensor, timestep: Tensor | float, output: Any) -> None:
        """Take note of what `network` made of them."""
        ...


current_call: ContextVar[Call | None] = ContextVar("current_call", default=None)
_lock = threading.Lock()


class _Watch:
    """The hooks of one network, and how many need them."""

    def __init__(self, network: nn.Module) -> None:
        # A copy of a hooked network has these hooks too, and is not what they are for.
        self.network = weakref.ref(network)
        self.count = 0
        self.handles = (
            network.register_forward_pre_hook(self.before, with_kwargs=True),
            network.register_forward_hook(self.after, with_kwargs=True),
        )

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # what is compiled is the network
    def before(self, network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.network() is not network:
            return None
        call = current_call.get()
        if call is None or not any(network is own for own in call.networks):
            raise SafetyError(
                f"{type(network).__name__} was called without a prompt of a protected pipeline; it is shared with one, "
                "so protect the pipeline that calls it as well"
            )
        given = dict(zip(POSITIONAL, args, strict=False)) | kwargs
        _check_given(network, args, given)
        moved = call.before(network, given["sample"], given["timestep"], given["encoder_hidden_states"])
        if len(args) > 2:
            return (*args[:2], moved), kwargs
        return args, kwargs | {"encoder_hidden_states": moved}

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def after(self, network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        call = current_call.get()
        if self.network() is network and call is not None:
            given = dict(zip(POSITIONAL, args, strict=False)) | kwargs
            call.after(network, given["sample"], given["timestep"], output)


_watches: weakref.WeakKeyDictionary[nn.Module, _Watch] = weakref.WeakKeyDictionary()


@contextmanager
def watched(networks: Iterable[nn.Module]) -> Iterator[None]:
    """Hook `networks` while the context lasts; the last context that needs a network leaves it as it was."""
    networks = list(networks)
    with _lock:
        for network in networks:
            watch = _watches.get(network) or _watches.setdefault(network, _Watch(network))
            watch.count += 1
    try:
        yield
    finally:
        with _lock:
            for network in networks:
                watch = _watches[network]
                watch.count -= 1
                if watch.count == 0:
                    for handle in watch.handles:
                        handle.remove()
                    del _watches[network]


def networks_of(pipeline: Any) -> tuple[nn.Module, ...]:
    """Every network of `pipeline` that is given the prompt, the UNet last; of compiled ones what was compiled.

    Raises:
        SafetyError: one of them cannot be watched.
    """
    control = getattr(pipeline, "controlnet", None)
    nets = getattr(control, "nets", None)  # of a MultiControlNetModel
    if nets is not None and (control is not _bare(control) or control._compiled_call_impl is not None):
        raise SafetyError("a MultiControlNetModel is compiled as a whole; compile each of its nets instead")
    controls = list(nets) if nets is not None else [] if control is None else [control]
    networks = tuple(_bare(network) for network in (*controls, pipeline.unet))
    for network in networks:
        name = type(network).__name__
        if not isinstance(network, nn.Module):
            raise SafetyError(f"{name} is no module of PyTorch, so that its calls cannot be watched")
        if network._compiled_call_impl is not None:
            raise SafetyError(
                f"{name} was compiled in place, which passes hooks by; assign the pipeline what `torch.compile` returns"
            )
    return networks


def _bare(network: Any) -> Any:
    """What `torch.compile` was given, whose hooks run outside of what is compiled."""
    return getattr(network, "_orig_mod", network)


def _check_given(network: nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> None:
    name = type(network).__name__
    if len(args) > len(POSITIONAL) or not given.keys() >= set(POSITIONAL):
        raise SafetyError(f"{name} was not called with sample, timestep and encoder_hidden_states; protection cannot follow")
    for argument in sorted(argument for argument, value in given.items() if value is not None and argument not in UNDERSTOOD):
        reason = REASONS.get(argument, "protection cannot follow it")
        raise SafetyError(f"{name} was given {argument}: {reason}")
    for argument in sorted(set(given.get("cross_attention_kwargs") or {}) - UNDERSTOOD_BY_ATTENTION):
        raise SafetyError(f"{name} was given cross_attention_kwargs[{argument!r}]: protection cannot follow it")
