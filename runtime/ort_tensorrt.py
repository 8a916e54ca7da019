"""ONNX Runtime's TensorRT providers, which compile graphs when they are first used, for the batches the bundle states.

What they compiled is kept in the user's cache under the hash of graph and weights. Steps are not captured in CUDA graphs: the
TensorRT provider keeps one graph a session, whatever the batch, and would replay it for another one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from saferedir.engines import Bundle
from saferedir.engines.errors import BackendError
from saferedir.engines.manifest import TensorInfo
from saferedir.engines.plan_cache import user_cache
from saferedir.runtime.ort_stream import OrtStreamBackend

#: Backend -> how the names of its options begin.
PREFIXES = {"ort-tensorrt": "trt", "ort-tensorrt-rtx": "nv"}


class OrtTensorRtBackend(OrtStreamBackend):
    """TensorRT compiles on the card it runs on; TensorRT-RTX does so in seconds, and comes as a plugin."""

    def __init__(self, bundle: Bundle, name: str, *, threads: int | None = None) -> None:
        super().__init__(bundle, name, threads=threads)
        self._devices = self._register(self._provider.plugin) if self._provider.plugin else []

    def _register(self, plugin: str) -> list[Any]:
        """The devices that a plugin of ONNX Runtime has a provider for."""
        wanted = self._provider.ort_name
        known = {device.ep_name for device in self._ort.get_ep_devices()}
        try:
            if wanted not in known:
                self._ort.register_execution_provider_library(wanted, import_module(plugin).get_library_path())
        except Exception as error:  # ONNX Runtime and the plugin raise several types of their own
            raise BackendError(f"{plugin} cannot be loaded: {str(error).strip().partition(chr(10))[0]}") from error
        found = [device for device in self._ort.get_ep_devices() if device.ep_name == wanted]
        if not found:
            raise BackendError(f"{self.name} finds no card that {wanted} knows; use ort-cuda, or a card of RTX 30 and later")
        return found[:1]

    def _open(self, graph: bytes, options: Any, provider_options: dict[str, str]) -> Any:
        if not self._devices:
            return super()._open(graph, options, provider_options)
        options.add_provider_for_devices(self._devices, provider_options)
        return self._ort.InferenceSession(graph, options)

    def _provider_options(self, engine: str) -> dict[str, str]:
        info = self._bundle.manifest.engines[engine]
        kept = self._kept(engine)
        kept.mkdir(parents=True, exist_ok=True)
        place = {"ort-tensorrt": "trt_engine_cache_path", "ort-tensorrt-rtx": "nv_runtime_cache_path"}[self.name]
        stream = {"has_user_compute_stream": "1"}
        profiles = profile_options(PREFIXES[self.name], info.inputs, self._bundle.manifest.max_batch)
        return {**super()._provider_options(engine), **stream, **profiles, place: str(kept)}

    def _kept(self, engine: str) -> Path:
        """Folder of what was compiled for this engine, which another graph or other weights never share."""
        info, files = self._bundle.manifest.engines[engine], self._bundle.manifest.files
        stated = "".join(files[name].sha256 for name in (info.file, *info.weights))
        return user_cache() / self.name / hashlib.sha256(stated.encode()).hexdigest()[:32]


def profile_options(prefix: str, inputs: Sequence[TensorInfo], max_batch: int) -> dict[str, str]:
    """Smallest, likeliest and largest shapes of the inputs, as the providers take them: `latent:1x4x16x16,prompt:...`."""
    sizes = {"min": 1, "opt": min(4, max_batch), "max": max_batch}
    return {
        f"{prefix}_profile_{kind}_shapes": ",".join(
            f"{tensor.name}:{'x'.join(str(size) if isinstance(dim, str) else str(dim) for dim in tensor.shape)}"
            for tensor in inputs
        )
        for kind, size in sizes.items()
    }
