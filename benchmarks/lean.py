"""Drawing where only the lean runtime's own packages can be imported and no host reached, as on a box that serves."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

from PIL.Image import Image

from saferedir.runtime import SafetyPolicy

#: Packages of training and export; the runtime must do without them.
HEAVY = ("torch", "diffusers", "transformers", "onnx", "scipy", "safetensors", "polygraphy")
CODE = """
import hashlib, sys
heavy = {heavy!r}
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in heavy:
            raise ImportError(f"{{name}} is refused")
sys.meta_path.insert(0, Refuse())
def refuse_the_network(event, _):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.sendto"):
        raise ConnectionError(f"{{event}} is refused")
sys.addaudithook(refuse_the_network)
from saferedir.runtime import Pipeline, SafetyPolicy
pipeline = Pipeline.from_bundle({bundle!r}, policy={policy!r})
picture = pipeline({prompt!r}, seed=0, num_inference_steps={steps}).images[0]
assert not [name for name in sys.modules if name.partition(".")[0] in heavy]
print(hashlib.sha256(picture.tobytes()).hexdigest())
"""


class LeanDrawingError(RuntimeError):
    """The process without the heavy packages failed; the message holds what it wrote."""


def draw_lean(bundle: Path | str, prompt: str, steps: int, policy: SafetyPolicy) -> str:
    """SHA-256 of the pixels that a process draws which can neither import `HEAVY` nor reach a host, with seed 0.

    Raises:
        LeanDrawingError: it failed, imported one of them, or asked for a host.
    """
    code = CODE.format(heavy=HEAVY, bundle=str(bundle), prompt=prompt, steps=steps, policy=policy)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise LeanDrawingError(result.stderr)
    return result.stdout.strip()


def pixels_sha256(picture: Image) -> str:
    """What `draw_lean` gives of a picture."""
    return hashlib.sha256(picture.tobytes()).hexdigest()
