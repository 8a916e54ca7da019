"""Compiled kernels are kept once a shape was met for the first time, and a cache that cannot be written stops nothing."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from saferedir.runtime.kernel_cache import KernelCache

PLAN = Path("plans") / "step-0123.plan"


class Kernels:
    """Stands for TensorRT-RTX's own cache, which a card is needed for."""

    def __init__(self) -> None:
        self.given: list[bytes] = []

    def deserialize(self, data: bytes) -> bool:
        self.given.append(data)
        return data == b"kernels"

    def serialize(self) -> bytes:
        return b"kernels"


class Config:
    def __init__(self) -> None:
        self.kernels = Kernels()
        self.used: Any = None

    def create_runtime_cache(self) -> Kernels:
        return self.kernels

    def set_runtime_cache(self, kernels: Kernels) -> None:
        self.used = kernels


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def test_kernels_are_kept_after_the_first_call_of_a_shape() -> None:
    config = Config()
    cache = KernelCache(PLAN, config)
    assert config.used is config.kernels
    cache.keep()
    assert not cache.path.exists()
    cache.meet(((1, 4),))
    cache.keep()
    assert cache.path.read_bytes() == b"kernels"
    cache.path.unlink()
    cache.meet(((1, 4),))
    cache.keep()
    assert not cache.path.exists()
    cache.meet(((2, 4),))
    cache.keep()
    assert cache.path.exists()


def test_the_next_process_is_given_them(caplog: pytest.LogCaptureFixture) -> None:
    first = KernelCache(PLAN, Config())
    first.meet(((1, 4),))
    first.keep()
    config = Config()
    KernelCache(PLAN, config)
    assert config.kernels.given == [b"kernels"]
    first.path.write_bytes(b"of another driver")
    with caplog.at_level(logging.INFO, "saferedir"):
        KernelCache(PLAN, Config())
    assert "compiled again" in caplog.text


def test_a_cache_that_cannot_be_written_is_said(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = KernelCache(PLAN, Config())
    (folder / "saferedir").write_bytes(b"a file where a folder should be")
    cache.meet(((1, 4),))
    cache.keep()
    assert "not kept" in caplog.text
