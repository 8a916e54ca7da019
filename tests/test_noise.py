"""Noise equals torch's, for every seed and shape."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saferedir.engines.errors import RequestError
from saferedir.runtime.noise import LARGEST_SEED, SMALLEST_SEED, TorchNoise, generator_seed


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(SMALLEST_SEED, LARGEST_SEED), shape=st.sampled_from([(1, 4, 16, 16), (1, 4, 64, 64), (3, 7), (17,), (16,)])
)
def test_equals_torch(seed: int, shape: tuple[int, ...]) -> None:
    theirs, ours = torch.Generator().manual_seed(seed), TorchNoise(seed)
    for _ in range(3):
        expected = torch.randn(shape, generator=theirs).numpy()
        assert np.abs(ours.draw(shape) - expected).max() <= 1e-6


@pytest.mark.parametrize("seed", [-1, -(2**32), SMALLEST_SEED, 2**32, 2**32 + 5, 2**63, LARGEST_SEED])
def test_a_seed_beyond_32_bits_draws_what_torch_draws(seed: int) -> None:
    expected = torch.randn(16, generator=torch.Generator().manual_seed(seed)).numpy()
    assert np.abs(TorchNoise(seed).draw((16,)) - expected).max() <= 1e-6
    assert np.abs(TorchNoise(generator_seed(seed)).draw((16,)) - expected).max() <= 1e-6


@pytest.mark.parametrize("seed", [SMALLEST_SEED - 1, LARGEST_SEED + 1])
def test_a_seed_that_torch_refuses_is_refused(seed: int) -> None:
    with pytest.raises(ValueError, match="Overflow"):
        torch.Generator().manual_seed(seed)
    with pytest.raises(RequestError, match="as torch takes them"):
        TorchNoise(seed)


def test_too_small_a_shape() -> None:
    with pytest.raises(RequestError, match="16"):
        TorchNoise(0).draw((3,))
