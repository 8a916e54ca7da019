"""Verification of a bundle: hashes, tensors read back from the engines, and one backend against another on real runs."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from saferedir.engines import Bundle, open_bundle
from saferedir.engines.bundle import check_tensors
from saferedir.engines.errors import BundleAlteredError, RequestError
from saferedir.runtime.backend import Backend
from saferedir.runtime.backends import make_backend
from saferedir.runtime.installation import import_onnxruntime
from saferedir.runtime.ort import PROVIDERS, give_weights, session_tensors
from saferedir.runtime.pipeline import Pipeline
from saferedir.runtime.policy import SafetyPolicy
from saferedir.runtime.replay import Recorded, Runs, draw, record_runs, replay

TORCH = "torch"
#: Bytes of a bundle whose engines are not held in memory all at once.
LARGE = 200_000_000


@dataclass(frozen=True)
class ParityRow:
    """One output of one engine against the other backend's, over all recorded calls."""

    engine: str
    output: str
    worst: float
    mean: float
    worst_relative: float
    mean_relative: float
    cosine: float
    #: Index of the worst element; calls are joined along the batch.
    where: str
    passed: bool
    allowed: float


@dataclass(frozen=True)
class PictureParity:
    """Whole runs of both backends under the bundle's own policy."""

    pictures: int
    decisions: int
    decisions_equal: int
    worst_score: float
    #: Of the worst picture, 8 bits a channel; infinite where all are equal.
    psnr: float
    #: Of the worst picture; None where torchmetrics is not installed.
    ssim: float | None
    #: As many decisions are equal as the bundle demands, and the worst picture is as near.
    passed: bool


@dataclass(frozen=True)
class BisectedEngine:
    """The first node of an engine that differs from the graph exported anew from its reference."""

    engine: str
    tensors: int
    equal_before: int
    node: str | None
    operator: str | None
    output: str | None
    worst: float
    #: Where in the model's source the node comes from.
    source: str | None


@dataclass(frozen=True)
class VerificationReport:
    """What `verify` found."""

    files: int
    engines: int
    #: None where the other backend is not here.
    parity: list[ParityRow] | None
    #: None where nothing was compared, or the bundle holds a safety alone.
    pictures: PictureParity | None
    bisected: list[BisectedEngine]
    parity_note: str

    @property
    def passed(self) -> bool:
        alike = self.pictures is None or self.pictures.passed
        return alike and (self.parity is None or all(row.passed for row in self.parity))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"passed": self.passed}


def verify_bundle(
    path_or_name: str | Path,
    model: Path | None = None,
    safety: Path | None = None,
    *,
    digest: str | None = None,
    backend: str = "ort-cpu",
    against_backend: str = TORCH,
    bisect: bool = False,
    runs: Runs | None = None,
    threads: int | None = None,
) -> VerificationReport:
    """Open the bundle with its hashes, read every engine's tensors back, and compare two backends on inputs of real runs.

    `model` and `safety` name what the eager reference is made of, the shipped ones by default. With `bisect`,
    engines that differ from it are followed to the first node that does. `runs` says how much is drawn; a model of
    full size wants less on a CPU. `threads` is for the backends of ONNX Runtime, `digest` pins the
    bundle.

    Raises:
        BundleError: a file is missing or altered, or an engine's tensors are not what the manifest says.
        RequestError: a comparison was asked for that a missing package prevents.
        BackendError: a backend cannot be had.
    """
    bundle = open_bundle(path_or_name, digest=digest)
    for name in bundle.manifest.engines:
        _check_tensors(bundle, name)
    counts = (len(bundle.manifest.files), len(bundle.manifest.engines))
    packages = ("polygraphy", "onnx", *(("torch", "diffusers") if TORCH in (backend, against_backend) or bisect else ()))
    if missing := [package for package in packages if importlib.util.find_spec(package) is None]:
        asked = model is not None or safety is not None or bisect or (backend, against_backend) != ("ort-cpu", TORCH)
        note = f"parity not checked: {', '.join(missing)} not installed (saferedir[export] brings it)"
        if asked:
            raise RequestError(note)
        return VerificationReport(*counts, None, None, [], note)
    runs = runs or Runs()
    first, second = (_opener(bundle, name, model, safety, threads) for name in (backend, against_backend))
    recorded = record_runs(bundle, first, runs)
    rows = [row for engine in bundle.manifest.engines for row in _compare(bundle, engine, first, second, recorded)]
    pictures = None if bundle.manifest.model is None else _compare_pictures(bundle, first, second, runs)
    wrong = sorted({row.engine for row in rows if not row.passed})
    bisected = _bisect(bundle, model, safety, wrong, recorded) if bisect else []
    return VerificationReport(*counts, rows, pictures, bisected, "")


def _opener(
    bundle: Bundle, name: str, model: Path | None, safety: Path | None, threads: int | None = None
) -> Callable[[], Backend]:
    """Gives the backend; of a large bundle anew for each comparison, since it holds the engines it ran, which would not all fit
    into memory. PyTorch's engines share their weights, so that one serves for all.
    """
    if name != "auto" and name not in PROVIDERS:
        threads = None
    if name != TORCH and sum(file.bytes for file in bundle.manifest.files.values()) > LARGE:
        return lambda: make_backend(bundle, name, threads=threads)
    if name != TORCH:
        backend = make_backend(bundle, name, threads=threads)
    else:
        from saferedir.export.torch_backend import TorchBackend  # loads torch

        backend = TorchBackend(bundle, model, safety)
    return lambda: backend


def _compare(
    bundle: Bundle, engine: str, first: Callable[[], Backend], second: Callable[[], Backend], recorded: Recorded
) -> list[ParityRow]:
    from saferedir.export.comparison import compare

    found, expected = (replay(bundle, backend(), engine, recorded) for backend in (first, second))
    allowed = bundle.manifest.precision.tolerance
    return [ParityRow(engine, output, *difference) for output, difference in compare(found, expected, allowed).items()]


def _compare_pictures(bundle: Bundle, first: Callable[[], Backend], second: Callable[[], Backend], runs: Runs) -> PictureParity:
    from saferedir.export.comparison import worst_picture

    policy = SafetyPolicy(beyond_promise=True)  # no picture leaves
    drawn = [draw(Pipeline(bundle, backend(), policy), 5.0, runs) for backend in (first, second)]
    steps = [[step for record in made.records for step in record.steps] for made in drawn]
    names = [concept.name for concept in bundle.manifest.safety.concepts]
    scores = [np.array([[step.score[name] for name in names] for step in own]) for own in steps]
    fired = [np.array([[name in step.fired for name in names] for step in own]) for own in steps]
    pixels = [np.stack([np.asarray(image) for image in made.images]) for made in drawn]
    psnr, ssim = worst_picture(*pixels)
    equal, demanded = fired[0] == fired[1], bundle.manifest.precision
    return PictureParity(
        pictures=len(pixels[0]),
        decisions=int(equal.size),
        decisions_equal=int(equal.sum()),
        worst_score=float(np.abs(scores[0] - scores[1]).max()),
        psnr=psnr,
        ssim=ssim,
        passed=float(equal.mean()) >= demanded.decisions and (demanded.psnr is None or psnr >= demanded.psnr),
    )


def _bisect(
    bundle: Bundle, model: Path | None, safety: Path | None, engines: list[str], recorded: Recorded
) -> list[BisectedEngine]:
    from saferedir.export.bisect import first_difference
    from saferedir.export.onnx_export import to_onnx
    from saferedir.export.reference import open_reference

    graphs, allowed = open_reference(bundle, model, safety).graphs, bundle.manifest.precision.tolerance
    traced: dict[str, Any] = {}
    return [
        BisectedEngine(
            engine,
            **asdict(
                first_difference(bundle.engine_path(engine), to_onnx(engine, graphs, traced), recorded[engine][-1], allowed)
            ),
        )
        for engine in engines
    ]


def _check_tensors(bundle: Bundle, name: str) -> None:
    """Read the tensors of an engine back from a session without optimisations."""
    if bundle.manifest.precision.compute == "bfloat16":
        return  # no session to read them from: this provider has no kernels in bf16
    ort = import_onnxruntime()
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    path, info = bundle.engine_path(name), bundle.manifest.engines[name]
    graph, weights = bundle.engine(name)
    try:
        give_weights(options, weights)
        session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime raises several types of its own
        raise BundleAlteredError(f"{path} cannot be loaded: {error}") from error
    check_tensors(f"{path}: inputs", session_tensors(session.get_inputs()), info.inputs)
    check_tensors(f"{path}: outputs", session_tensors(session.get_outputs()), info.outputs)
