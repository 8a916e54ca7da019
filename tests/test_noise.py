"""Noise equals torch's, for every seed and shape."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saferedir.engines.errors import RequestError
from saferedir.runtime.noise import LARGEST_SEED, TorchNoise


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, LARGEST_SEED), shape=st.sampled_from([(1, 4, 16, 16), (1, 4, 64, 64), (3, 7), (17,), (16,)]))
def test_equals_torch(seed: int, shape: tuple[int, ...]) -> None:
    theirs, ours = torch.Generator().manual_seed(seed), TorchNoise(seed)
    for _ in range(3):
        expected = torch.randn(shape, generator=theirs).numpy()
        assert np.abs(ours.draw(shape) - expected).max() <= 1e-6


@pytest.mark.parametrize("seed", [-1, LARGEST_SEED + 1])
def test_seed_out_of_range(seed: int) -> None:
    with pytest.raises(RequestError, match="seed"):
        TorchNoise(seed)


def test_too_small_a_shape() -> None:
    with pytest.raises(RequestError, match="16"):
        TorchNoise(0).draw((3,))
