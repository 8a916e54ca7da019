"""Commands of `saferedir`."""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from saferedir.engines import DEFAULT_BUNDLE
from saferedir.engines.errors import RequestError, VerificationError
from saferedir.engines.manifest import PUBLISHED
from saferedir.engines.printable import printable
from saferedir.runtime.command_line import evaluating, learning, making, serving
from saferedir.runtime.command_line.console import (
    BundleOption,
    DigestOption,
    JsonOption,
    ThreadsOption,
    console,
    print_json,
    progress,
    warn,
)
from saferedir.runtime.command_line.picture_size import picture_size

if TYPE_CHECKING:
    from saferedir.engines import Manifest
    from saferedir.runtime.pipeline import Generation
    from saferedir.runtime.verify import VerificationReport

app = typer.Typer(
    help="Draw pictures with the safety always on.\n\nExit codes: 0 done, 2 bad request, 3 bad bundle, 4 no backend, "
    "5 safety failed closed, 6 output not written, 7 verification failed, 8 busy, 130 interrupted.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
BackendOption = Annotated[str, typer.Option("--backend", help="auto, or one that `doctor` lists.")]


@app.command()
def generate(
    prompts: Annotated[list[str] | None, typer.Argument(help="One prompt a picture.")] = None,
    file: Annotated[Path | None, typer.Option("--file", help="A file with one prompt a line.")] = None,
    out: Annotated[str, typer.Option("--out", "-o", help="Output folder, or - for one PNG on stdout.")] = "pictures",
    count: Annotated[int, typer.Option(help="Pictures a prompt.")] = 1,
    seed: Annotated[int, typer.Option(help="Seed of the first picture, the next ones count up; -1 for a random one.")] = 0,
    steps: Annotated[int, typer.Option(help="Denoising steps, 1 to 999.")] = 25,
    guidance: Annotated[float, typer.Option(help="Guidance scale; at most 1 draws unguided.")] = 5.0,
    negative: Annotated[
        str | None, typer.Option(help="What to draw away from. Needs guidance above 1, and is else ignored, which is said.")
    ] = None,
    rescale: Annotated[
        float, typer.Option("--guidance-rescale", help="0 to 1: takes what guidance draws to its conditional half's contrast.")
    ] = 0.0,
    scheduler: Annotated[
        str | None,
        typer.Option(
            help="ddim, euler, euler-ancestral, dpm++-2m or lcm; euler and dpm++-2m also with -karras or -exponential. The "
            "bundle's own, which its promise is for, by default."
        ),
    ] = None,
    size: Annotated[str | None, typer.Option(help="SIDE or HEIGHTxWIDTH in pixels; `inspect` lists which.")] = None,
    bundle: BundleOption = DEFAULT_BUNDLE,
    digest: DigestOption = None,
    backend: BackendOption = "auto",
    threads: ThreadsOption = None,
    concept: Annotated[
        list[str] | None, typer.Option(help="Operator only: look for this concept alone, or again for more. Logged.")
    ] = None,
    beyond_promise: Annotated[
        bool,
        typer.Option("--beyond-promise", help="Operator only: draw with settings that the safety was not made for. Logged."),
    ] = False,
    unprotected: Annotated[bool, typer.Option("--unprotected", help="Operator only: draw without safety. Logged.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Draw prompts, at most 1,000 pictures a call. Pictures get the next free number in their folder; none is overwritten.

    Examples:

    `saferedir generate "a church next to a cat" --seed 7 --out pictures`

    `saferedir generate --file prompts.txt --count 4 --json > records.json`

    `saferedir generate "a church as a woodcut print" --concept ink --out pictures`

    `saferedir generate "a cat in ink style" --out - > cat.png`
    """
    from saferedir.runtime.outputs import output_folder
    from saferedir.runtime.pipeline import Pipeline
    from saferedir.runtime.policy import SafetyPolicy
    from saferedir.runtime.request import check_count
    from saferedir.runtime.tokenizer import READ

    asked = _prompts(prompts, file)
    check_count(len(asked), count)
    to_stdout = out == "-"
    if to_stdout and (len(asked) * count != 1 or as_json):
        raise RequestError("--out - writes one PNG to stdout; ask for one picture, without --json")
    with nullcontext(None) if to_stdout else output_folder(Path(out)) as folder:
        policy = SafetyPolicy(
            enabled=tuple(concept) if concept else None, beyond_promise=beyond_promise, unprotected=unprotected
        )
        pipeline = Pipeline.from_bundle(bundle, backend=backend, policy=policy, digest=digest, threads=threads)
        height, width = picture_size(size) if size else (None, None)
        with progress("drawing") as on_step:
            result = pipeline(
                asked,
                height=height,
                width=width,
                negative_prompt=negative,
                seed=None if seed == -1 else seed,
                num_images_per_prompt=count,
                num_inference_steps=steps,
                guidance_scale=guidance,
                guidance_rescale=rescale,
                scheduler=scheduler,
                on_step=on_step,
            )
        files = _write(result, folder)
    for index, record in enumerate(result.records):
        if record.tokens_cut:
            few = "at least " if len(record.prompt or "") > READ else ""
            warn(f"{few}{record.tokens_cut} tokens of prompt {index // count + 1} did not fit and were cut")
    if as_json:
        listed = [{"file": name, **record.to_dict()} for name, record in zip(files, result.records, strict=True)]
        print_json(listed)
        return
    for written, record in zip(files, result.records, strict=False):
        said = "unprotected" if not record.protected else "redirected" if record.fired else "nothing fired"
        console.print(f"{written}  {said}", soft_wrap=True)


def _write(result: Generation, folder: Path | None) -> list[str]:
    """Write the pictures to `folder`, or the only one to stdout; returns the files' names."""
    from saferedir.runtime.outputs import png_bytes, write_picture

    if folder is None:
        sys.stdout.buffer.write(png_bytes(result.images[0]))
        return []
    pictures = zip(result.images, result.records, strict=True)
    return [str(write_picture(folder, record.seed, image)) for image, record in pictures]


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the sheet and the page.")] = Path("demo-output"),
    bundle: BundleOption = DEFAULT_BUNDLE,
    digest: DigestOption = None,
    backend: BackendOption = "auto",
    threads: ThreadsOption = None,
    seed: Annotated[int, typer.Option(help="Seed of the first picture; -1 for a random one.")] = 7,
) -> None:
    """Draw twelve prompts without and with safety: a contact sheet, and a page with every step's score.

    Example: `saferedir demo --out demo-output`
    """
    from saferedir.runtime.demo import run_demo

    with progress("drawing both ways") as on_step:
        sheet, page = run_demo(
            out, bundle, backend=backend, threads=threads, digest=digest, seed=None if seed == -1 else seed, on_step=on_step
        )
    console.print(f"contact sheet  {sheet.resolve()}\npage           {page.resolve()}", soft_wrap=True)


@app.command()
def inspect(
    bundle: Annotated[str, typer.Argument(help="Bundle folder, or an embedded one's name.")] = DEFAULT_BUNDLE,
    digest: DigestOption = None,
    plans: Annotated[
        str | None, typer.Option(help="tensorrt-rtx or tensorrt: its plans instead, on a card that they fit.")
    ] = None,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON schema of manifests instead.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Say what a bundle holds: model, concepts, engines with their tensors, versions.

    Examples:

    `saferedir inspect emoji-diffusion`

    `saferedir inspect bundle --plans tensorrt-rtx` (layers, what they compute in, shapes, memory)
    """
    if plans is not None:
        _show_plans(bundle, digest, plans, as_json)
        return
    from saferedir.engines import open_bundle

    if schema:
        from saferedir.engines.schema import manifest_schema

        print(json.dumps(manifest_schema(), indent=1))
        return
    opened = open_bundle(bundle, digest=digest)
    manifest = opened.manifest
    if as_json:
        print_json(json.loads(manifest.to_json()))
        return
    total = sum(info.bytes for info in manifest.files.values())
    console.print(
        f"{printable(manifest.name)}  {manifest.model_family}, {total / 1e6:.1f} MB in {opened.folder}",
        soft_wrap=True,
    )
    console.print(f"digest {opened.digest}", highlight=False, soft_wrap=True)
    console.print(
        f"weights {manifest.precision.storage}, arithmetic {manifest.precision.compute}, batch up to {manifest.max_batch}"
    )
    console.print("made with " + ", ".join(printable(f"{k} {v}") for k, v in manifest.made_with.items()))
    console.print(_made_for(manifest))
    for concept in manifest.safety.concepts:
        decided = "decided by argmax" if concept.threshold is None else f"threshold {concept.threshold:g}"
        named = f"{printable(concept.name)} → {printable(concept.replacement)}"
        strength = "" if concept.alpha_scale is None else f", alpha_scale {concept.alpha_scale:g}"
        console.print(f"concept {named}, {decided}{strength}")
    promise = manifest.safety.promise
    console.print(
        f"promise: {printable(promise)}" if promise else "thresholds not calibrated: no promise on false alarms", soft_wrap=True
    )
    if manifest.scheduler is not None:
        replaced = f" in place of {printable(manifest.scheduler.in_place_of)}" if manifest.scheduler.in_place_of else ""
        console.print(f"drawn with {manifest.scheduler.kind}{replaced}")
    if manifest.model is not None:
        console.print(f"pictures of {', '.join(manifest.model.picture_sizes)} pixels", soft_wrap=True)
    table = Table("engine", "MB", "inputs", "outputs")
    for name, engine in manifest.engines.items():
        size = manifest.files[engine.file].bytes / 1e6
        table.add_row(printable(name), f"{size:.2f}", _tensors(engine.inputs), _tensors(engine.outputs))
    console.print(table)


def _show_plans(bundle: str, digest: str | None, backend: str, as_json: bool) -> None:
    from saferedir.engines import open_bundle
    from saferedir.runtime.tensorrt import MODULES, TensorRtBackend

    if backend not in MODULES:
        raise RequestError(f"--plans is {backend!r}; expected one of {', '.join(MODULES)}")
    opened = open_bundle(bundle, digest=digest)
    seen = TensorRtBackend(opened, backend).inspect_all()
    if as_json:
        print_json([{**asdict(plan), "path": str(plan.path)} for plan in seen])
        return
    table = Table("engine", "layers", "outputs of layers", "batch", "memory, MB", "plan")
    for plan in seen:
        types = ", ".join(f"{count} {name}" for name, count in plan.types.items())
        batch = ":".join(str(shape[0]) for shape in next(iter(plan.profiles.values())))
        table.add_row(plan.engine, str(plan.layers), types, batch, f"{plan.memory / 1e6:.1f}", str(plan.path))
    console.print(table)


@app.command()
def verify(
    bundle: Annotated[str, typer.Argument(help="Bundle folder, or an embedded one's name.")] = DEFAULT_BUNDLE,
    digest: DigestOption = None,
    against: Annotated[Path | None, typer.Option(help="Diffusers folder of the reference; the shipped one by default.")] = None,
    safety: Annotated[
        Path | None, typer.Option(help="Safety module, or published checkpoint, of the reference; the shipped one by default.")
    ] = None,
    backend: Annotated[str, typer.Option(help="Backend that is verified; see `doctor`.")] = "ort-cpu",
    against_backend: Annotated[str, typer.Option(help="Backend that it must equal; torch is the eager reference.")] = "torch",
    bisect: Annotated[bool, typer.Option("--bisect", help="Find the first node of each engine that differs.")] = False,
    pictures: Annotated[int, typer.Option(help="Pictures in the runs that are compared, 1 to 4, in one batch.")] = 4,
    steps: Annotated[int, typer.Option(help="Their denoising steps.")] = 8,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check hashes and tensors, and, where the packages are installed, one backend against another on real runs.

    Examples:

    `saferedir verify emoji-diffusion --json`

    `saferedir verify bundle --against MODEL --safety castle/safety --bisect`

    `saferedir verify bundle --backend ort-cuda --against-backend ort-cpu`

    `saferedir verify bundle --against MODEL --safety castle/safety --pictures 1 --steps 2` (a model of full size on a CPU)
    """
    from saferedir.runtime.replay import Runs
    from saferedir.runtime.verify import TORCH, verify_bundle

    if (against or safety) and not bisect and TORCH not in (backend, against_backend):
        raise RequestError("--against and --safety name the reference in PyTorch, which neither backend is; leave them out")
    report = verify_bundle(
        bundle, against, safety, digest=digest,
        backend=backend, against_backend=against_backend, bisect=bisect, runs=Runs(pictures, steps),
        threads=threads,
    )  # fmt: skip
    if as_json:
        print_json(report.to_dict())
    else:
        _show(report)
    if not report.passed:
        raise VerificationError(f"{backend} differs from {against_backend} by more than allowed; see the table")


def _show(report: VerificationReport) -> None:
    console.print(f"{report.files} files: hashes as stated; {report.engines} engines: tensors as stated")
    if report.parity is None:
        console.print(report.parity_note)
        return
    table = Table("engine", "output", "worst", "mean", "cosine", "allowed", "", box=None)
    for row in report.parity:
        numbers = (f"{row.worst:.1e}", f"{row.mean:.1e}", f"{row.cosine:.7f}", f"{row.allowed:.0e}")
        table.add_row(row.engine, row.output, *numbers, "" if row.passed else "differs")
    console.print(table)
    if (drawn := report.pictures) is not None:
        ssim = "" if drawn.ssim is None else f", SSIM {drawn.ssim:.6f}"
        console.print(
            f"{drawn.pictures} pictures: {drawn.decisions_equal} of {drawn.decisions} decisions equal, worst score difference "
            f"{drawn.worst_score:.1e}, worst picture PSNR {drawn.psnr:.1f} dB{ssim}",
            highlight=False,
            soft_wrap=True,
        )
    for engine in report.bisected:
        said = (
            f"no tensor of {engine.tensors} differs by itself"
            if engine.node is None
            else f"differs from node {engine.node} ({engine.operator}{f', {engine.source}' if engine.source else ''}) on, "
            f"output {engine.output} by {engine.worst:.1e}; "
            f"{engine.equal_before} of {engine.tensors} tensors before it are equal"
        )
        console.print(f"{engine.engine}: {said}", soft_wrap=True)


learning.add_to(app)
app.command()(evaluating.evaluate)
app.command()(making.export)
app.command(name="import-published")(making.import_published)
app.command(name="build-plans")(making.build_plans)
app.command()(serving.serve)
app.add_typer(serving.policy_app, name="policy")
app.add_typer(serving.audit_app, name="audit")
app.add_typer(serving.keys_app, name="keys")


@app.command()
def doctor(as_json: JsonOption = False) -> None:
    """Say which backends can be had here, with versions, and how to get what is missing.

    Example: `saferedir doctor`
    """
    from saferedir.runtime.doctor import diagnose

    diagnosis = diagnose()
    if as_json:
        print_json(diagnosis.to_dict())
    else:
        console.print(", ".join(f"{k} {v}" for k, v in diagnosis.machine.items()))
        console.print(", ".join(f"{k} {v or 'not installed'}" for k, v in diagnosis.packages.items()))
        table = Table("backend", "here", "note")
        for status in diagnosis.backends:
            table.add_row(status.name, "yes" if status.available else "no", status.note)
        console.print(table)
    if diagnosis.problems:
        for problem in diagnosis.problems:
            typer.echo(f"problem: {printable(problem)}", err=True)
        raise typer.Exit(4)


def _made_for(manifest: Manifest) -> str:
    if manifest.controller == PUBLISHED:
        return "published network and controller (compatibility): decides after each step, so the first is unprotected"
    transfer = manifest.model is not None and manifest.safety.unet_sha256 != manifest.model.unet_sha256
    return "safety trained with " + ("another UNet (transfer)" if transfer else "this UNet")


def _prompts(prompts: list[str] | None, file: Path | None) -> list[str]:
    if bool(prompts) == (file is not None):
        raise RequestError("give prompts, or --file with one prompt a line, not both")
    if prompts:
        return prompts
    assert file is not None
    from saferedir.engines.text_files import read_prompts

    return read_prompts(file)


def _tensors(infos: Any) -> str:
    return "\n".join(f"{printable(info.name)} {info.dtype} [{', '.join(map(str, info.shape))}]" for info in infos)
