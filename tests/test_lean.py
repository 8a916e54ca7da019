"""The runtime does without the training stack."""

from __future__ import annotations

import subprocess
import sys

import pytest

from benchmarks.lean import HEAVY, LeanDrawingError, draw_lean, pixels_sha256
from saferedir.engines import DEFAULT_BUNDLE
from saferedir.runtime import Pipeline, SafetyPolicy


def test_draws_where_neither_the_training_stack_nor_a_host_is_there() -> None:
    policy = SafetyPolicy(thresholds={"church": 0.0}, cooldown=1)
    drawn = Pipeline.from_bundle(policy=policy)("a cat", seed=0, num_inference_steps=4).images[0]
    assert draw_lean(DEFAULT_BUNDLE, "a cat", 4, policy) == pixels_sha256(drawn)


def test_a_process_that_needs_the_training_stack_fails() -> None:
    with pytest.raises(LeanDrawingError, match="torch is refused"):
        draw_lean(DEFAULT_BUNDLE, "a cat", 2, NeedsTorch())


def test_a_process_that_asks_for_a_host_fails() -> None:
    with pytest.raises(LeanDrawingError, match=r"socket\.getaddrinfo is refused"):
        draw_lean(DEFAULT_BUNDLE, "a cat", 2, AsksForAHost())


class AsksForAHost(SafetyPolicy):
    def __repr__(self) -> str:
        return "__import__('socket').create_connection(('example.org', 80))"


class NeedsTorch(SafetyPolicy):
    def __repr__(self) -> str:
        return "__import__('torch')"


def test_torch_backend_without_torch_names_the_extra() -> None:
    code = f"""
import sys
for name in {HEAVY!r}: sys.modules[name] = None
from saferedir.engines import open_bundle
from saferedir.engines.errors import MissingDependencyError
from saferedir.runtime.backends import backend_names, make_backend
assert "torch" in backend_names()
try: make_backend(open_bundle("emoji-diffusion"), "torch")
except MissingDependencyError as error: print(error)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "saferedir[torch]" in result.stdout, result.stderr


def test_import_warns_without_onnxruntime() -> None:
    code = "import sys; sys.modules['onnxruntime'] = None; import saferedir.runtime"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0
    assert "saferedir[cpu]" in result.stderr


def test_the_runtime_is_imported_where_the_system_has_no_fcntl() -> None:
    code = "import sys; sys.modules['fcntl'] = None; import saferedir.runtime, saferedir.engines.plan_cache; print('imported')"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.stdout == "imported\n", result.stderr
