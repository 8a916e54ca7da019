"""TensorRT and TensorRT-RTX: plans that were built ahead of time, on device buffers and one stream.

Nothing in the loop waits for the device: calls are enqueued, and the download after the last step synchronises the stream.
"""

from __future__ import annotations

import tempfile
import threading
import weakref
from collections.abc import Mapping
from contextlib import suppress
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from saferedir.engines import Bundle
from saferedir.engines.errors import BackendError, MissingDependencyError, PlanError, RequestError
from saferedir.engines.plan_cache import FittingPlan, PlanCache, user_cache
from saferedir.runtime.backend import Array, Call, DeviceTensor, Tensors
from saferedir.runtime.kernel_cache import KernelCache
from saferedir.runtime.plan_inspection import InspectedPlan, inspect_plan

#: Backend, which is also the builder of its plans -> module and distribution.
MODULES = {"tensorrt-rtx": "tensorrt_rtx", "tensorrt": "tensorrt"}
#: What TensorRT-RTX 1.7 says of itself on a card that it has no plans for.
RTX_CARDS = (
    "TensorRT-RTX has plans for compute capabilities 8.0, 8.6, 8.9, 12.0 and later: on one of these build another on this "
    "machine, on others use ort-cuda or tensorrt"
)


def plan_folders(bundle: Bundle) -> list[Path]:
    """Where plans are looked for: the bundle's own folder of them, then the user's cache, if there is one."""
    folders = [bundle.folder / "plans"]
    with suppress(PlanError):
        folders.append(user_cache())
    return folders


class TensorRtBackend:
    """Plans are opened on first use, one execution context each; calls of all threads go to one stream, one at a time."""

    captures = False

    def __init__(self, bundle: Bundle, name: str) -> None:
        self.name = name
        self._trt, self._cuda = _import(name), _import("polygraphy.cuda")
        self._bundle = bundle
        self._stream = self._open_stream()
        self._runtime = self._trt.Runtime(self._trt.Logger(self._trt.Logger.ERROR))
        self._engines: dict[str, tuple[FittingPlan, Any, Any]] = {}
        #: By the path of a plan.
        self._kernels: dict[Path, KernelCache] = {}
        self._lock = threading.Lock()

    def upload(self, array: Array) -> DeviceTensor:
        host = np.ascontiguousarray(array)
        tensor = self.empty(host.shape, host.dtype)
        tensor.copy_from(host, self._stream)
        self._stream.synchronize()  # the caller's array may change from now on
        return tensor

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> DeviceTensor:
        tensor = self._cuda.DeviceArray(shape=tuple(shape), dtype=np.dtype(dtype))
        weakref.finalize(tensor, self._cuda.wrapper().free, tensor.ptr)
        return tensor

    def bind(self, engine: str, inputs: Tensors, outputs: Tensors, rows: int | None = None) -> Call:
        plan, _, context = self._engine(engine)
        info = self._bundle.manifest.engines[engine]
        given = {tensor.name: tuple(inputs[tensor.name].shape) for tensor in info.inputs}
        shapes = {name: shape if rows is None else (rows, *shape[1:]) for name, shape in given.items()}
        check_profile(engine, plan, shapes)
        addresses = {tensor.name: inputs[tensor.name].ptr for tensor in info.inputs}
        addresses |= {tensor.name: outputs[tensor.name].ptr for tensor in info.outputs}

        def call() -> None:
            with self._lock:
                if plan.path in self._kernels:
                    self._kernels[plan.path].meet(tuple(shapes.values()))
                for name, shape in shapes.items():
                    context.set_input_shape(name, shape)
                for name, address in addresses.items():
                    context.set_tensor_address(name, address)
                if not context.execute_async_v3(self._stream.ptr):
                    raise BackendError(f"{plan.path} could not be run by {self.name}")

        return call

    def write(self, tensor: DeviceTensor, row: int, values: Array) -> None:
        values = np.ascontiguousarray(values)
        self._copy(_row(tensor, row), values.ctypes.data, values.nbytes, "HostToDevice")

    def move(self, tensor: DeviceTensor, target: int, source: int) -> None:
        self._copy(_row(tensor, target), _row(tensor, source), _row(tensor, 1) - _row(tensor, 0), "DeviceToDevice")

    def read(self, tensor: DeviceTensor, row: int = 0, rows: int | None = None) -> Array:
        count, *shape = tensor.shape
        host = np.empty((count - row if rows is None else rows, *shape), np.dtype(tensor.dtype))
        self._copy(host.ctypes.data, _row(tensor, row), host.nbytes, "DeviceToHost")
        self._stream.synchronize()
        with self._lock:
            for kernels in self._kernels.values():
                kernels.keep()
        return host

    def _copy(self, target: int, source: int, size: int, kind: str) -> None:
        """In the stream's order; does not wait for the device."""
        self._cuda.wrapper().memcpy(target, source, size, getattr(self._cuda.MemcpyKind, kind), self._stream.ptr)

    def inspect_all(self) -> list[InspectedPlan]:
        """What the plans that fit this card are made of, of each engine that there is one of.

        Raises:
            PlanError: there is none of any engine; the message is about the last one.
        """
        seen, problem = [], None
        for engine in self._bundle.manifest.engines:
            try:
                plan, opened, _ = self._engine(engine)
            except PlanError as error:
                problem = error
                continue
            seen.append(inspect_plan(engine, plan.path, opened, self._trt))
        if not seen and problem is not None:
            raise problem
        return seen

    def versions(self) -> dict[str, str]:
        return {"backend": self.name, MODULES[self.name]: self._trt.__version__}

    def _open_stream(self) -> Any:
        try:
            return self._cuda.Stream()
        except Exception as error:  # polygraphy raises a type of its own, which cannot be imported without it
            raise BackendError(f"{self.name} needs an NVIDIA GPU and its driver: {str(error).partition('. ')[0]}") from error

    def _engine(self, engine: str) -> tuple[FittingPlan, Any, Any]:
        with self._lock:
            if engine not in self._engines:
                plans = find_plans(self._bundle, engine, self.name, self._trt.__version__)
                self._engines[engine] = self._open(engine, plans)
            return self._engines[engine]

    def _refit(self, plan: FittingPlan, opened: Any, engine: str) -> None:
        """Give a plan that was built without weights those of the bundle."""
        logger = self._trt.Logger(self._trt.Logger.ERROR)
        refitter = self._trt.Refitter(opened, logger)
        with tempfile.TemporaryDirectory() as place:  # a copy of what was hashed: the parser takes paths
            graph = str(self._bundle.copy_engine(engine, Path(place)))
            if not self._trt.OnnxParserRefitter(refitter, logger).refit_from_file(graph) or not refitter.refit_cuda_engine():
                raise PlanError(
                    f"{plan.path} was built without weights and does not take those of {self._bundle.engine_path(engine)}; "
                    "build it again"
                )

    def _open(self, engine: str, plans: list[FittingPlan]) -> tuple[FittingPlan, Any, Any]:
        """The first plan that fits the card: which cards a plan is for says its header, before it is deserialised."""
        for plan in plans:
            data = plan.read()
            if self.name == "tensorrt-rtx":
                validity, _ = self._runtime.get_engine_validity(data)
                if validity == self._trt.EngineValidity.INVALID:
                    continue
            opened = self._runtime.deserialize_cuda_engine(data)
            if opened is not None:
                self._check_tensors(plan, opened, engine)
                if plan.stripped:
                    self._refit(plan, opened, engine)
                return plan, opened, self._context(plan, opened)
        paths = ", ".join(str(plan.path) for plan in plans)
        advice = RTX_CARDS if self.name == "tensorrt-rtx" else "build another on this machine"
        raise PlanError(f"none of these fits this card and driver: {paths}; {advice}")

    def _check_tensors(self, plan: FittingPlan, opened: Any, engine: str) -> None:
        """Refuse a plan of other tensors than the engine's, whatever it is called."""
        info, found = self._bundle.manifest.engines[engine], {}
        for index in range(opened.num_io_tensors):
            name = opened.get_tensor_name(index)
            is_input = opened.get_tensor_mode(name) == self._trt.TensorIOMode.INPUT
            dtype = np.dtype(self._trt.nptype(opened.get_tensor_dtype(name))).name
            found[name] = (is_input, dtype, [None if size < 0 else size for size in opened.get_tensor_shape(name)])
        expected = {
            tensor.name: (is_input, tensor.dtype, [None if isinstance(size, str) else size for size in tensor.shape])
            for tensors, is_input in ((info.inputs, True), (info.outputs, False))
            for tensor in tensors
        }
        if found != expected:
            odd = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
            raise PlanError(f"{plan.path} has other tensors than {engine} ({', '.join(odd)}); build it again")

    def _context(self, plan: FittingPlan, opened: Any) -> Any:
        if self.name != "tensorrt-rtx":
            return opened.create_execution_context()
        config = opened.create_runtime_config()
        config.cuda_graph_strategy = self._trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        self._kernels[plan.path] = KernelCache(plan.path, config)
        return opened.create_execution_context(config)


def _row(tensor: DeviceTensor, row: int) -> int:
    """The address of a row."""
    address: int = tensor.ptr + np.dtype(tensor.dtype).itemsize * int(np.prod(tensor.shape[1:])) * row
    return address


def find_plans(bundle: Bundle, engine: str, builder: str, builder_version: str) -> list[FittingPlan]:
    """The plans of an engine for this builder and version, whatever batch and cards they were built for.

    Raises:
        PlanError: there is none; the message says what is there and how it differs.
    """
    said = []
    for folder in plan_folders(bundle):
        found = PlanCache(folder).fitting(bundle, engine, builder, builder_version)
        if not isinstance(found, str):
            return found
        said.append(found)
    command = f"saferedir build-plans {bundle.folder} --target {builder}"
    raise PlanError(f"no plan of {engine} for {builder} {builder_version}: {'; '.join(said)}. Build it by `{command}`")


def check_profile(engine: str, plan: FittingPlan, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise `RequestError` where an input's shape is outside of what the plan was built for."""
    for name, shape in shapes.items():
        low, likely, high = plan.profiles[name]
        if not all(least <= size <= most for size, least, most in zip(shape, low, high, strict=True)):
            batch = f"--batch {min(low[0], shape[0])}:{likely[0]}:{max(high[0], shape[0])}"
            raise RequestError(
                f"{engine}: {name} has the shape {list(shape)}, its plan takes {list(low)} to {list(high)}; "
                f"build another with {batch}"
            )


def _import(name: str) -> Any:
    module = MODULES.get(name, name)
    try:
        return import_module(module)
    except ImportError as error:
        raise MissingDependencyError(f"this backend needs the package {module}; install saferedir[tensorrt]") from error


def installed_version(name: str) -> str | None:
    """Version of the backend's library, or None where it is not installed."""
    try:
        return version(MODULES[name])
    except PackageNotFoundError:
        return None
