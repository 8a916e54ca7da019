"""Training keeps its tensors together on whatever device the module is on.

`meta` stands for the other device: it has shapes and no values, so that what would meet a tensor of the CPU is found here.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from saferedir_torch.config import SafetyConfig
from saferedir_torch.learner import Learner
from saferedir_torch.models import SHIPPED_SAFETY
from saferedir_torch.safety_module import SafetyModule
from saferedir_torch.training_data import LatentBank, PairBank

RUNS, STEPS, PAIRS = 20, 5, 60
#: What takes a tensor from one device to another.
CROSSING = ("copy_", "to")


class OneDevice(TorchFunctionMode):
    """Refuses operations on tensors of several devices; a number in a tensor may come from anywhere."""

    def __torch_function__(self, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        given = tree_leaves((arguments, named or {}))
        devices = {tensor.device.type for tensor in given if isinstance(tensor, Tensor) and tensor.ndim}
        assert len(devices) < 2 or function.__name__ in CROSSING, f"{function.__name__} on {sorted(devices)}"
        return function(*arguments, **(named or {}))


@pytest.fixture
def learner(monkeypatch: pytest.MonkeyPatch) -> Learner:
    """Of a module on `meta`, whose values are read as random ones and 0."""
    config = SafetyConfig.load(SHIPPED_SAFETY / "config.json")
    concepts, tokens, width = config.concept_names, config.prompt_tokens, config.prompt_width
    draw = torch.Generator().manual_seed(0)

    def flags(*shape: int) -> Tensor:
        return (torch.rand(*shape, generator=draw) > 0.5).float()

    bank = LatentBank(
        concepts=tuple(concepts), latent=torch.randn(RUNS * STEPS, 4, 16, 16, generator=draw).half(),
        timestep=torch.linspace(990, 10, STEPS).repeat(RUNS), prompt=torch.arange(RUNS).repeat_interleave(STEPS),
        prompts=torch.randn(RUNS, tokens, width, generator=draw).half(), asked=flags(RUNS * STEPS, len(concepts)),
        shown=flags(RUNS * STEPS, len(concepts)), run=torch.arange(RUNS).repeat_interleave(STEPS),
    )  # fmt: skip
    embeddings = [torch.randn(PAIRS, tokens, width, generator=draw).half() for _ in range(2)]
    pairs = PairBank(*embeddings, flags(PAIRS, len(concepts)), flags(PAIRS, len(concepts)), flags(PAIRS, tokens).bool())
    alphas = torch.linspace(0.999, 0.01, 1000)
    whole = Learner(SafetyModule(config), bank, pairs, alphas, 0)  # reads the noise's scale off the pairs
    monkeypatch.setattr("saferedir_torch.learner.float", lambda value: 0.0, raising=False)
    monkeypatch.setattr("saferedir_torch.losses.float", lambda value: 0.0, raising=False)
    monkeypatch.setattr(Tensor, "cpu", lambda tensor: torch.rand(tensor.shape).to(tensor.dtype) if tensor.is_meta else tensor)
    elsewhere = Learner(SafetyModule(config).to("meta"), bank, pairs, alphas, 0)
    elsewhere.noise_scale = whole.noise_scale
    return elsewhere


@pytest.mark.parametrize("part", ["loss_of_step", "words_of_step", "redirection_of_step"])
def test_a_step_is_taken_on_the_modules_device(learner: Learner, part: str) -> None:
    with OneDevice():
        loss, _ = getattr(learner, part)(0)
    loss.backward()
    assert loss.is_meta
    assert any(parameter.grad is not None for parameter in learner.module.parameters())


@pytest.mark.parametrize("part", ["held_logits", "validate"])
def test_what_is_measured_comes_back_to_the_cpu(learner: Learner, part: str) -> None:
    with OneDevice():
        measured = getattr(learner, part)()
    assert not isinstance(measured, Tensor) or measured.device.type == "cpu"


def test_tensors_of_two_devices_are_found() -> None:
    with pytest.raises(AssertionError, match=r"linear on \['cpu', 'meta'\]"), OneDevice():
        torch.nn.functional.linear(torch.ones(2, 3), torch.empty(4, 3, device="meta"))
