"""What lower precision changes: decisions, pictures, what is forgotten, size, and the tensors that come nearest to overflow.

In half every tensor of the exported graphs is rounded to its type (`saferedir.export.rounded`), over whole runs. In int8 the
weights alone are, of UNet and VAE, one scale an output channel; a runtime makes floats of them once, at loading, so that only
the file is smaller. Bundles are exported anew, and pictures of the same graphs and weights, kept in `--work`, used again.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from benchmarks.drawing import DEPLOYED, PLAIN, Drawn, Studio, plain_of
from benchmarks.report import save
from benchmarks.tables.forgetting import Judges
from benchmarks.test_sets import unsafe_set
from saferedir.engines import Bundle, open_bundle
from saferedir.export.bundle_export import BundleOptions, export_bundle
from saferedir.export.half import ISLANDS
from saferedir.export.rounded import MAGNITUDES, RoundedBackend, load_rounded, watched
from saferedir.runtime import Pipeline
from saferedir.runtime.ort import OrtBackend
from saferedir.runtime.replay import RecordingBackend
from saferedir_torch.evaluation.intervals import share
from saferedir_torch.models import SHIPPED_SAFETY, load_pipeline
from saferedir_torch.safety_module import SafetyModule
from saferedir_torch.world.captions import all_names
from saferedir_torch.world.prompts import CONCEPTS, benign_prompt
from saferedir_torch.world.split import load_split

LARGEST = {"fp16": 65504.0, "bf16": 3.39e38}
#: Tensors of each engine that are named.
WORST_TENSORS = 3
#: Pictures are asked to come as near to those in fp32, in dB.
NEAR = 40.0
#: Pictures of which every tensor is watched, one call of each engine a step.
WATCHED = 8
MASKED = "text_encoder"
WATCHED_ENGINES = (MASKED, "step", "vae_decoder")
#: The weights' files of a bundle.
WEIGHTS = ("text_encoder.safetensors", "unet.safetensors", "vae.safetensors", "safety.safetensors")


INT8 = "int8"


@dataclass(frozen=True)
class Way:
    """A precision, the modules that stay in fp32, and operators of the others that are not rounded."""

    title: str
    precision: str
    islands: tuple[type[nn.Module], ...] = ISLANDS
    exact: tuple[str, ...] = ()

    @property
    def watched(self) -> bool:
        """Whether its tensors' magnitudes are looked at: once a bundle in half."""
        return self.precision in LARGEST and not self.exact

    @property
    def bundle_name(self) -> str:
        if self.precision == INT8:
            return INT8
        return f"{self.precision}-{'islands' if self.islands else 'throughout'}"


WAYS = (
    Way("fp16, as exported: norms in fp32", "fp16"),
    Way("fp16 throughout", "fp16", islands=()),
    Way("fp16, norms and softmax in fp32", "fp16", exact=("Softmax",)),
    Way("bf16, as exported: norms in fp32", "bf16"),
    Way("bf16 throughout", "bf16", islands=()),
    Way("bf16, norms and softmax in fp32", "bf16", exact=("Softmax",)),
    Way("int8 weights, fp32 else", INT8),
)
QUANTISED = (nn.Conv2d, nn.Linear)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=60, help="unsafe pictures a concept, held-out names; as many benign ones")
    parser.add_argument("--rewrites", type=int, default=1000, help="validation rewrites for the judge's threshold")
    parser.add_argument("--work", type=Path, default=Path("runs/evaluation"))
    options = parser.parse_args()
    figures = measure(options.count, options.rewrites, options.work)
    table = Table("", "decisions equal", "worst PSNR", "median PSNR", *CONCEPTS, "weights, MB", "largest of its type")
    for row in figures["rows"]:
        fsr = [f"{100 * row['fsr'][name]['share']:.1f} %" for name in CONCEPTS]
        equal = row["decisions_equal"]
        near = (
            max(tensors[0]["of_largest"] for name, tensors in row["largest"].items() if name != MASKED) if row["largest"] else 0
        )
        table.add_row(row["way"], f"{equal['hits']} of {equal['of']}", f"{row['worst_psnr']:.1f}", f"{row['median_psnr']:.1f}",
                      *fsr, f"{row['weight_bytes'] / 1e6:.1f}", f"{100 * near:.2g} %")  # fmt: skip
    Console().print(table)
    print(save("precision", figures))


def measure(count: int, rewrites: int, work: Path) -> dict[str, Any]:
    """All ways on the same prompts and seeds, against the deployed engines in fp32."""
    split, studio = load_split(), Studio(work)
    shutil.rmtree(work / "precision", ignore_errors=True)
    reference = Pipeline.from_bundle(backend="ort-cpu")
    tested = {name: unsafe_set(concept, split, "held_out", count, 1, seed=4) for name, concept in CONCEPTS.items()}
    rng = np.random.default_rng(91)
    prompts = [prompt for own in tested.values() for prompt in own.prompts]
    benign = len(prompts)
    prompts += [benign_prompt(list(CONCEPTS.values()), rng, all_names()).text for _ in range(benign)]
    seeds = [seed for own in tested.values() for seed in own.seeds]
    seeds += [int(seed) for seed in rng.integers(*split.seeds["test"], size=benign)]
    plain = plain_of(reference)
    judges = {name: Judges.calibrated(studio, plain, concept, split, rewrites) for name, concept in CONCEPTS.items()}
    before = studio.draw(plain, PLAIN, prompts, seeds, "unprotected")
    expected = studio.draw(reference, DEPLOYED, prompts, seeds, "fp32")
    rows = []
    for way in (None, *WAYS):
        bundle = reference.bundle if way is None else _bundle(way, work / "precision")
        found = expected if way is None else _draw(studio, bundle, way, prompts, seeds)
        psnr = _psnr(found, expected)
        equal = found.fired == expected.fired
        fsr = {}
        for index, (name, concept) in enumerate(CONCEPTS.items()):
            own = np.arange(index * count, (index + 1) * count)
            shown = judges[name].found(before.rows(own), concept)
            gone = ~judges[name].found(found.rows(own), concept)[shown]
            fsr[name] = share(int(gone.sum()), int(shown.sum()))
        rows.append({
            "way": "fp32" if way is None else way.title,
            "decisions_equal": share(int(equal.sum()), equal.size),
            "worst_score_difference": float(np.abs(found.score - expected.score).max()),
            "worst_psnr": float(psnr.min()),
            "median_psnr": float(np.median(psnr)),
            "near": share(int((psnr >= NEAR).sum()), len(psnr)),
            "fsr": fsr,
            "weight_bytes": _int8_bytes(reference.bundle) if way and way.precision == INT8 else _stored(bundle),
            "largest": _largest(reference, bundle, way, prompts, seeds) if way and way.watched else {},
        })  # fmt: skip
    return {"pictures": len(prompts), "benign": benign, "steps": int(expected.score.shape[1]), "rows": rows}


def _bundle(way: Way, folder: Path) -> Bundle:
    """Exported once a run, for all ways that draw with it."""
    out = folder / way.bundle_name
    module = SafetyModule.load(SHIPPED_SAFETY)
    if not out.exists():
        pipeline, precision = load_pipeline(), way.precision
        if precision == INT8:
            precision = "fp32"
            quantise(pipeline)
        options = BundleOptions(name=way.bundle_name, max_batch=16, precision=precision, islands=way.islands)
        export_bundle(pipeline, module, out, options)
    return open_bundle(out)


def _draw(studio: Studio, bundle: Bundle, way: Way, prompts: Sequence[str], seeds: Sequence[int]) -> Drawn:
    files = bundle.manifest.files
    hashes = [files[name].sha256 for name in ("step.onnx", "unet.safetensors", "safety.safetensors")]
    identity = " ".join(["rounded", *way.exact, *hashes])
    backend = OrtBackend(bundle, "ort-cpu") if way.precision == INT8 else RoundedBackend(bundle, exact=way.exact)
    pipeline = Pipeline(bundle, backend)
    return studio.draw(pipeline, identity, prompts, seeds, way.title)


@torch.no_grad()
def quantise(pipeline: Any) -> None:
    """Round the weights of convolutions and linear layers in UNet and VAE to 255 steps, one scale an output channel."""
    for module in (*pipeline.unet.modules(), *pipeline.vae.modules()):
        if isinstance(module, QUANTISED):
            rows = module.weight.flatten(1)
            scale = rows.abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / 127
            module.weight.copy_(((rows / scale).round() * scale).reshape(module.weight.shape))


def _stored(bundle: Bundle) -> int:
    """Bytes of all weight files."""
    return sum(bundle.manifest.files[file].bytes for file in WEIGHTS)


def _int8_bytes(reference: Bundle) -> int:
    """The same where weights of convolutions and linear layers take a byte each, and two bytes an output channel, in place of
    two bytes each."""
    stored, pipeline = _stored(reference), load_pipeline()
    for module in (*pipeline.unet.modules(), *pipeline.vae.modules()):
        if isinstance(module, QUANTISED):
            stored += 2 * len(module.weight) - module.weight.numel()
    return stored


def _psnr(found: Drawn, expected: Drawn) -> Any:
    """[R], in dB; 100 where all pixels are equal."""
    squares = ((found.pixels.astype(np.float64) - expected.pixels) ** 2).mean(axis=(1, 2, 3))
    return np.where(squares == 0, 100.0, 10 * np.log10(255**2 / np.maximum(squares, 1e-9)))


def _largest(
    reference: Pipeline, bundle: Bundle, way: Way, prompts: Sequence[str], seeds: Sequence[int]
) -> dict[str, list[dict[str, Any]]]:
    """Of each engine, the tensors whose magnitude comes nearest to the largest that their type holds, over all steps of some
    fp32 runs. The text encoder's are its causal mask, which is the type's lowest number by design."""
    recording = RecordingBackend(reference.backend, reference.manifest.engines)
    rows = np.linspace(0, len(prompts) - 1, WATCHED).astype(int)
    Pipeline(reference.bundle, recording)([prompts[row] for row in rows], seed=[int(seeds[row]) for row in rows])
    found = {}
    for engine in WATCHED_ENGINES:
        model, names = watched(load_rounded(bundle, engine))
        options = onnxruntime.SessionOptions()
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(bundle.folder.resolve()))
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        largest = np.max([session.run([MAGNITUDES], given)[0] for given in recording.recorded[engine]], axis=0)
        found[engine] = [
            {"tensor": names[row], "largest": float(largest[row]), "of_largest": float(largest[row]) / LARGEST[way.precision]}
            for row in np.argsort(largest)[: -WORST_TENSORS - 1 : -1]
        ]
    return found


if __name__ == "__main__":
    main()
