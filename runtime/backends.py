"""Backends by name. ONNX Runtime's and TensorRT's are built in, others are entry points, imported only when asked for."""

from __future__ import annotations

from importlib.metadata import entry_points

from saferedir.engines import Bundle
from saferedir.engines.errors import BackendError, MissingDependencyError, RequestError
from saferedir.runtime.backend import Backend
from saferedir.runtime.ort import PROVIDERS, OrtBackend, resolve_provider
from saferedir.runtime.ort_cuda import OrtCudaBackend
from saferedir.runtime.ort_tensorrt import PREFIXES as ORT_TENSORRT
from saferedir.runtime.ort_tensorrt import OrtTensorRtBackend
from saferedir.runtime.tensorrt import MODULES as TENSORRT
from saferedir.runtime.tensorrt import TensorRtBackend

ENTRY_POINT_GROUP = "saferedir.backends"


def backend_names() -> list[str]:
    """Every name that `make_backend` takes, whether or not it can be had here."""
    return ["auto", *PROVIDERS, *TENSORRT, *sorted(point.name for point in entry_points(group=ENTRY_POINT_GROUP))]


def make_backend(bundle: Bundle, name: str, *, threads: int | None = None, shared: bool = False) -> Backend:
    """The backend of that name for `bundle`; `auto` takes the best one of ONNX Runtime.

    `shared` is for a service, whose engines several threads call: on the CPU they then do not take the cores from each other.

    Raises:
        BackendError: the name is unknown, or the backend cannot be had here; the message says what to install.
        RequestError: `threads` is no number of threads, or is given for a backend that computes with none of ONNX Runtime's.
    """
    if name == "auto" or name in PROVIDERS:
        chosen = resolve_provider(name)
        if chosen == "ort-cuda":
            return OrtCudaBackend(bundle, threads=threads)
        if chosen in ORT_TENSORRT:
            return OrtTensorRtBackend(bundle, chosen, threads=threads)
        return OrtBackend(bundle, chosen, threads=threads, shared=shared)
    if threads is not None and name in backend_names():
        raise RequestError(f"threads is {threads}, of which backend {name!r} makes no use; leave it out")
    if name in TENSORRT:
        return TensorRtBackend(bundle, name)
    for point in entry_points(group=ENTRY_POINT_GROUP):
        if point.name == name:
            try:
                factory = point.load()
            except ImportError as error:
                raise MissingDependencyError(
                    f"backend {name!r} needs a package that is missing ({error.name}); install saferedir[torch]"
                ) from error
            backend: Backend = factory(bundle)
            return backend
    raise BackendError(f"backend {name!r} is unknown; expected one of {', '.join(backend_names())}")
