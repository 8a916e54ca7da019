"""The runtime does without the training stack."""

from __future__ import annotations

import subprocess
import sys

HEAVY = ("torch", "diffusers", "transformers", "onnx", "scipy", "safetensors")

CODE = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {heavy!r}:
            raise ImportError(f"{{name}} is refused")
sys.meta_path.insert(0, Refuse())
import saferedir.runtime, saferedir.engines
picture = saferedir.runtime.Pipeline.from_bundle()("a cat", num_inference_steps=2).images[0]
assert picture.size == (64, 64)
print(sorted(name for name in sys.modules if name.partition(".")[0] in {heavy!r}))
"""


def test_draws_where_the_training_stack_cannot_be_imported() -> None:
    code = CODE.format(heavy=HEAVY)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"


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
    code = """
import importlib.metadata as metadata
found = metadata.version
def version(name):
    if name.startswith("onnxruntime"): raise metadata.PackageNotFoundError(name)
    return found(name)
metadata.version = version
import saferedir.runtime
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "saferedir[cpu]" in result.stderr


def test_import_warns_of_both_onnxruntimes() -> None:
    code = """
import importlib.metadata as metadata
found = metadata.version
metadata.version = lambda name: "1" if name.startswith("onnxruntime") else found(name)
import saferedir.runtime
from saferedir.engines.errors import MissingDependencyError
from saferedir.runtime.ort import import_onnxruntime
try: import_onnxruntime()
except MissingDependencyError as error: print(error)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "both onnxruntime" in result.stderr
    assert "both onnxruntime" in result.stdout
