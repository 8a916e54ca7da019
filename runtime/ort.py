"""ONNX Runtime backends by name: the CPU's here, CUDA's and TensorRT's in `ort_cuda.py` and `ort_tensorrt.py`."""

from __future__ import annotations

import ctypes
import logging
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np

from saferedir.engines import Bundle
from saferedir.engines.bundle import EngineBytes, check_tensors
from saferedir.engines.errors import BackendError, ProviderMismatchError
from saferedir.engines.manifest import TensorInfo
from saferedir.runtime.backend import Array, Call, DeviceTensor, Tensors
from saferedir.runtime.cuda import device_count
from saferedir.runtime.installation import import_onnxruntime, installed_distributions
from saferedir.runtime.threads import thread_count

log = logging.getLogger("saferedir")


@dataclass(frozen=True)
class Bound:
    """A session with tensors bound by address. ONNX Runtime does not hold them, so that this does, as long as it may be run."""

    session: Any
    binding: Any
    tensors: tuple[DeviceTensor, ...]

    def run(self, options: Any = None) -> None:
        self.session.run_with_iobinding(self.binding, options)


@dataclass(frozen=True)
class Provider:
    """An execution provider of ONNX Runtime, and the device its tensors live on."""

    ort_name: str
    device: str
    options: Mapping[str, str]
    #: Package of a provider that comes apart from ONNX Runtime, as a plugin.
    plugin: str | None = None
    #: What brings it.
    advice: str = "install saferedir[gpu] in place of saferedir[cpu]"


#: On CUDA float32 is not rounded to tf32, and no algorithm is chosen by a race, so that a picture is the same in every run.
PROVIDERS = {
    "ort-cpu": Provider("CPUExecutionProvider", "cpu", {}),
    "ort-cuda": Provider("CUDAExecutionProvider", "cuda", {"use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC"}),
    "ort-tensorrt": Provider(
        "TensorrtExecutionProvider", "cuda", {"trt_engine_cache_enable": "1"},
        advice="install saferedir[gpu] in place of saferedir[cpu], and the TensorRT that its ONNX Runtime is built for",
    ),
    "ort-tensorrt-rtx": Provider(
        "NvTensorRTRTXExecutionProvider", "cuda", {}, plugin="onnxruntime_ep_nv_tensorrt_rtx", advice="install saferedir[rtx]"
    ),
}  # fmt: skip
#: `auto` takes the first of these that this installation offers.
PREFERENCE = ("ort-cuda", "ort-cpu")
#: ONNX Runtime's names of types -> numpy's.
TYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(int32)": "int32",
    "tensor(int64)": "int64",
    "tensor(bool)": "bool",
}
#: A file that no graph reads. Once files are given in memory, ONNX Runtime reads the weights of a graph from no others.
NO_FILE = {".": b"\0"}


def resolve_provider(name: str) -> str:
    """The provider name for `name`, where `auto` takes the best one offered that has a device here, and logs it.

    Raises:
        BackendError: the name is unknown, or this installation of ONNX Runtime does not offer it.
    """
    offered = import_onnxruntime().get_available_providers()
    if name == "auto":
        chosen = next(candidate for candidate in PREFERENCE if can_be_had(PROVIDERS[candidate], offered))
        log.info("backend: %s chosen automatically; ONNX Runtime offers %s", chosen, ", ".join(offered))
        return chosen
    if name not in PROVIDERS:
        raise BackendError(f"backend {name!r} is unknown; expected auto, {', '.join(PROVIDERS)}")
    provider = PROVIDERS[name]
    if not is_offered(provider, offered):
        raise BackendError(
            f"backend {name!r} needs {provider.ort_name}, this ONNX Runtime offers {', '.join(offered)}; {provider.advice}"
        )
    return name


def is_offered(provider: Provider, offered: list[str]) -> bool:
    """Whether ONNX Runtime has the provider, or its plugin is installed."""
    return provider.ort_name in offered if provider.plugin is None else find_spec(provider.plugin) is not None


def can_be_had(provider: Provider, offered: list[str]) -> bool:
    """Whether ONNX Runtime offers the provider, and this machine has a device for it."""
    return is_offered(provider, offered) and (provider.device != "cuda" or device_count() > 0)


class OrtBackend:
    """Sessions are made on first use and used by all threads; every call has its own bindings.

    `shared` says that several threads call at once. On the CPU one engine then computes at a time, and threads that have
    nothing to do sleep: ONNX Runtime lets them spin, which is faster alone and takes the cores from whatever else computes.
    """

    captures = False

    def __init__(self, bundle: Bundle, provider: str = "auto", *, threads: int | None = None, shared: bool = False) -> None:
        self._ort = import_onnxruntime()
        self.name = resolve_provider(provider)
        self._provider = PROVIDERS[self.name]
        self._bundle = bundle
        self._threads = thread_count(threads)
        self._sessions: dict[str, Any] = {}
        self._shared, self._computing = shared, threading.Lock()
        self._lock = threading.RLock()

    def upload(self, array: Array) -> DeviceTensor:
        # On the CPU an OrtValue reads numpy's own memory, so a copy keeps the caller's array out of it.
        return self._ort.OrtValue.ortvalue_from_numpy(np.array(array, order="C"), self._provider.device, 0)

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> DeviceTensor:
        return self._ort.OrtValue.ortvalue_from_shape_and_type(shape, dtype.type, self._provider.device, 0)

    def bind(self, engine: str, inputs: Tensors, outputs: Tensors, rows: int | None = None) -> Call:
        bound = self._bound(engine, inputs, outputs, rows)
        if not self._shared:
            return bound.run

        def call() -> None:
            with self._computing:
                bound.run()

        return call

    def write(self, tensor: DeviceTensor, row: int, values: Array) -> None:
        _rows_of(tensor)[row : row + len(values)] = values

    def move(self, tensor: DeviceTensor, target: int, source: int) -> None:
        rows = _rows_of(tensor)
        rows[target] = rows[source]

    def read(self, tensor: DeviceTensor, row: int = 0, rows: int | None = None) -> Array:
        return _rows_of(tensor)[row : None if rows is None else row + rows].copy()

    def versions(self) -> dict[str, str]:
        return {"backend": self.name, **(installed_distributions() or {"onnxruntime": self._ort.__version__})}

    def _bound(self, engine: str, inputs: Tensors, outputs: Tensors, rows: int | None) -> Bound:
        """The engine's session, and its tensors bound."""
        session = self._session(engine)
        info, device = self._bundle.manifest.engines[engine], self._provider.device
        binding, held = session.io_binding(), []
        for bind, infos, tensors in ((binding.bind_input, info.inputs, inputs), (binding.bind_output, info.outputs, outputs)):
            for tensor in infos:
                placed = tensors[tensor.name]
                shape = placed.shape() if rows is None else [rows, *placed.shape()[1:]]
                bind(tensor.name, device, 0, np.dtype(tensor.dtype).type, shape, placed.data_ptr())
                held.append(placed)
        return Bound(session, binding, tuple(held))

    def _session(self, engine: str) -> Any:
        with self._lock:
            if engine not in self._sessions:
                self._sessions[engine] = self._load(engine)
            return self._sessions[engine]

    def _provider_options(self, engine: str) -> dict[str, str]:
        return dict(self._provider.options)

    def _bytes(self, engine: str) -> EngineBytes:
        """Graph and weights, as they were hashed."""
        return self._bundle.engine(engine)

    def _reason(self, error: Exception) -> str:
        if self.name == "ort-cpu" and self._bundle.manifest.precision.compute == "bfloat16":
            return (
                "it computes in bf16, which this CPU provider has no kernels for; export it in fp32 or fp16, or run it on a GPU"
            )
        return _first_line(error)

    def _open(self, graph: bytes, options: Any, provider_options: dict[str, str]) -> Any:
        """A session on the provider."""
        return self._ort.InferenceSession(graph, options, providers=[(self._provider.ort_name, provider_options)])

    def _load(self, engine: str) -> Any:
        options = self._ort.SessionOptions()
        options.intra_op_num_threads = self._threads
        options.log_severity_level = 3
        if self._shared:
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        wanted = self._provider.ort_name
        if wanted != "CPUExecutionProvider":
            options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        path = self._bundle.engine_path(engine)
        graph, weights = self._bytes(engine)
        try:
            give_weights(options, weights)
            session = self._open(graph, options, self._provider_options(engine))
        except Exception as error:  # ONNX Runtime raises several types of its own
            raise BackendError(f"{path} cannot be loaded on {self.name}: {self._reason(error)}") from error
        if session.get_providers()[0] != wanted:
            raise ProviderMismatchError(f"{path} was asked for on {wanted} but runs on {session.get_providers()[0]}")
        info = self._bundle.manifest.engines[engine]
        check_tensors(f"{path}: inputs", session_tensors(session.get_inputs()), info.inputs)
        check_tensors(f"{path}: outputs", session_tensors(session.get_outputs()), info.outputs)
        return session


def give_weights(options: Any, weights: Mapping[str, bytes]) -> None:
    """Let a session of `options` read these files of weights, which it copies from, and no others."""
    files = {**NO_FILE, **weights}
    options.add_external_initializers_from_files_in_memory(list(files), list(files.values()), [*map(len, files.values())])


def session_tensors(found: Any) -> tuple[TensorInfo, ...]:
    """The inputs or outputs of a session, as a manifest states them."""
    return tuple(TensorInfo(own.name, TYPES.get(own.type, own.type), tuple(own.shape)) for own in found)


def _rows_of(tensor: DeviceTensor) -> Array:
    """The memory of a tensor on the CPU."""
    shape, dtype = tuple(tensor.shape()), np.dtype(TYPES[tensor.data_type()])
    memory = (ctypes.c_byte * tensor.tensor_size_in_bytes()).from_address(tensor.data_ptr())
    return np.frombuffer(memory, dtype).reshape(shape)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
