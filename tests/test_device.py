"""Training keeps its tensors together on whatever device the module is on.

`meta` stands for the other device: it has shapes and no values, so that what would meet a tensor of the CPU is found here.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from diffusers import PixArtTransformer2DModel
from small_module import CONCEPTS, TOKENS, WIDTH, small_config
from small_runs import small_bank
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from saferedir_torch.calibration import Seen
from saferedir_torch.learner import Learner
from saferedir_torch.pairs import PairBank
from saferedir_torch.pixart import Denoiser
from saferedir_torch.runs import RunBank
from saferedir_torch.safety_module import SafetyModule

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


@pytest.fixture(params=["cpu", "meta"])
def learner(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Learner:
    """Of a module on `meta`, whose values are read as random ones and 0, with runs and pairs on either device."""
    config = small_config()
    draw = torch.Generator().manual_seed(0)

    def flags(*shape: int) -> Tensor:
        return (torch.rand(*shape, generator=draw) > 0.5).float()

    asked, shown = flags(RUNS * STEPS, CONCEPTS), flags(RUNS * STEPS, CONCEPTS)
    bank = small_bank(RUNS, STEPS, config.concept_names, asked=asked, shown=shown)
    embeddings = torch.randn(2, PAIRS, TOKENS, WIDTH, generator=draw).half()
    pairs = PairBank(*embeddings, flags(PAIRS, CONCEPTS), flags(PAIRS, CONCEPTS), flags(PAIRS, TOKENS).bool())
    pairs.replaced[::3] = 0  # of prompts in which nothing is to change
    whole = Learner(SafetyModule(config), bank, pairs, 0)  # reads the noise's scale off the pairs
    monkeypatch.setattr("saferedir_torch.learner.float", lambda value: 0.0, raising=False)
    monkeypatch.setattr("saferedir_torch.losses.float", lambda value: 0.0, raising=False)
    monkeypatch.setattr(Tensor, "cpu", lambda tensor: torch.rand(tensor.shape).to(tensor.dtype) if tensor.is_meta else tensor)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    elsewhere = Learner(SafetyModule(config).to("meta"), bank, pairs, 0)
    elsewhere.noise_scale = whole.noise_scale
    elsewhere.store = torch.device(request.param)
    for name, value in vars(elsewhere).items():
        if isinstance(value, Tensor | RunBank | PairBank):
            setattr(elsewhere, name, value.to(elsewhere.store))
    return elsewhere


def test_a_step_is_taken_on_the_modules_device(learner: Learner) -> None:
    with OneDevice():
        loss, _ = learner.loss_of_step(0)
    loss.backward()
    assert loss.is_meta
    assert any(parameter.grad is not None for parameter in learner.module.parameters())


def test_what_is_measured_comes_back_as_numbers(learner: Learner) -> None:
    with OneDevice():
        measured = learner.validate()
    assert {"loss", "told", "shown", "words", "aim", "accuracy"} <= measured.keys()


def test_what_a_module_makes_of_runs_comes_back_to_the_cpu(learner: Learner) -> None:
    bank = small_bank(4, 3)
    with OneDevice():
        seen = Seen(learner.module, bank)
        assert seen.highest(seen.statistic(learner.module)).device.type == "cpu"


def test_a_transformer_takes_a_timestep_of_the_cpu() -> None:
    """As schedulers give it."""
    transformer = PixArtTransformer2DModel(
        num_layers=1, num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16, caption_channels=16, in_channels=4,
        out_channels=4, sample_size=8,
    )  # fmt: skip
    denoiser = Denoiser(transformer).to("meta")
    with OneDevice():
        (noise,) = denoiser(torch.empty(2, 4, 8, 8, device="meta"), torch.tensor(5), torch.empty(2, 7, 16, device="meta"))
    assert noise.is_meta


def test_tensors_of_two_devices_are_found() -> None:
    with pytest.raises(AssertionError, match=r"linear on \['cpu', 'meta'\]"), OneDevice():
        torch.nn.functional.linear(torch.ones(2, 3), torch.empty(4, 3, device="meta"))
