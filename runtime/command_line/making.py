"""Commands that make bundles and plans."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from saferedir.engines import DEFAULT_BUNDLE
from saferedir.engines.errors import MissingDependencyError, RequestError
from saferedir.runtime.command_line.console import DigestOption, JsonOption, console, print_json, progress
from saferedir.runtime.command_line.picture_size import picture_size

if TYPE_CHECKING:
    from saferedir.export.plan_builder import PlanOptions


def export(
    model: Annotated[Path, typer.Argument(help="Folder in diffusers' format, hub name, or one .safetensors file.")],
    safety: Annotated[Path, typer.Option(help="Safety module folder, as training left it.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Bundle folder: new, empty, or a bundle, which is replaced.")],
    name: Annotated[str | None, typer.Option(help="What the bundle calls itself; the model folder's name by default.")] = None,
    max_batch: Annotated[int, typer.Option(min=1, max=31, help="Largest batch run at once.")] = 16,
    size: Annotated[
        str | None, typer.Option(help="Sizes of pictures besides the model's own: SIDE or HEIGHTxWIDTH, colons between them.")
    ] = None,
    precision: Annotated[str, typer.Option(help="What the model computes in: fp32, fp16 or bf16.")] = "fp32",
    config: Annotated[
        str | None, typer.Option(help="Folder or hub name with the configuration of a single file; the hub's by default.")
    ] = None,
    lora: Annotated[
        list[str] | None, typer.Option(help="FILE or FILE:SCALE of a LoRA to fuse in, again for more; scale 1 by default.")
    ] = None,
    vae: Annotated[Path | None, typer.Option(help="Another VAE: a folder in diffusers' format, or one file.")] = None,
    clip_skip: Annotated[int, typer.Option(min=0, help="Last layers of the text encoder to leave out.")] = 0,
    textual_inversion: Annotated[
        list[str] | None, typer.Option(help="FILE or FILE:WORD of a textual inversion whose word is added; again for more.")
    ] = None,
    target: Annotated[
        str, typer.Option(help="onnx, or onnx with plans: onnx,tensorrt-rtx or onnx,tensorrt, or both.")
    ] = "onnx",
    batch: Annotated[str, typer.Option(help="SMALLEST:LIKELIEST:LARGEST batch of the plans.")] = "1:4:8",
    save_model: Annotated[
        Path | None, typer.Option(help="Folder for the model as exported, which `verify --against` and training take.")
    ] = None,
) -> None:
    """Export a model and its safety module to a bundle. Needs `saferedir[export]`.

    The safety itself computes in fp32 whatever the model computes in.

    Examples:

    `saferedir export runs/world/emoji-diffusion --safety runs/church/safety --out bundle`

    `saferedir export stable-diffusion-v1-5 --safety runs/church/safety --out bundle --precision fp16`

    `saferedir export stable-diffusion-v1-5 --safety castle --out bundle --lora details.safetensors:0.8 --vae better-vae`

    `saferedir export stable-diffusion-v1-5 --safety castle --out bundle --precision fp16 --target onnx,tensorrt-rtx`

    `saferedir export model.safetensors --config stable-diffusion-v1-5 --safety castle --out bundle --save-model model`

    `saferedir export stable-diffusion-v1-5 --safety castle --out bundle --size 512x768:768x512`

    Every size has engines of its own, which share their weights, so that shapes are fixed and steps can be captured.

    Plans are kept in the bundle's own folder; what of them an interrupted command left out, `build-plans --in-bundle` builds.

    A safety module fits one text encoder. Where a LoRA or `--clip-skip` changes it, train the module on what `--save-model`
    writes.
    """
    try:
        from saferedir.export.bundle_export import BundleOptions
        from saferedir.export.command import export_folder
        from saferedir.export.model_changes import ModelChanges
    except ImportError as error:
        raise MissingDependencyError(f"export needs the package {error.name}; install saferedir[export]") from error
    plans = _plan_options(target, batch)
    options = BundleOptions(
        name=name or model.stem,
        max_batch=max_batch,
        precision=precision,
        words=tuple(_named_word(text) for text in textual_inversion or ()),
        further_sizes=tuple(picture_size(text) for text in size.split(":")) if size else (),
    )
    changes = ModelChanges(loras=tuple(_lora(text) for text in lora or ()), vae=vae, clip_skip=clip_skip)
    with progress("exporting") as on_step:
        folder = export_folder(model, safety, out, options, changes, config=config, save_model=save_model, on_step=on_step,
                               on_size=_say_size, on_note=_say)  # fmt: skip
    for wanted in plans:
        _build_in_bundle(folder, wanted)
    console.print(f"{folder}: {_megabytes(folder)}")


def import_published(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint of the published SafeRedir, such as best_model.pt.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Bundle folder: new, empty, or a bundle, which is replaced.")],
    model: Annotated[
        Path | None, typer.Option(help="Stable Diffusion 1.x folder to protect; without it the bundle holds the safety alone.")
    ] = None,
    concept: Annotated[str, typer.Option(help="What the checkpoint forgets; it does not say so itself.")] = "unsafe",
    replacement: Annotated[str, typer.Option(help="What that is redirected to, for people.")] = "safe",
    cooldown: Annotated[int, typer.Option(help="Steps of rest after firing.")] = 2,
    alpha_scale: Annotated[float, typer.Option(help="Strength of redirection.")] = 1.25,
    mask_again: Annotated[bool, typer.Option("--mask-again", help="Multiply displacements by the mask once more.")] = False,
    name: Annotated[str | None, typer.Option(help="What the bundle calls itself; the checkpoint's name by default.")] = None,
    max_batch: Annotated[int, typer.Option(min=1, max=31, help="Largest batch run at once.")] = 16,
) -> None:
    """Make a bundle of a published checkpoint: its network, its controller, its numbers. Needs `saferedir[export]`.

    It decides after each step, so the first one is unprotected, and has no threshold; `export` is the better safety.

    Examples:

    `saferedir import-published best_model.pt --out safety-alone`

    `saferedir import-published best_model.pt --model stable-diffusion-v1-5 --concept church --out bundle`
    """
    try:
        from saferedir.export.bundle_export import BundleOptions
        from saferedir.export.command import import_checkpoint
        from saferedir.export.published_import import PublishedOptions
    except ImportError as error:
        raise MissingDependencyError(f"importing needs the package {error.name}; install saferedir[export]") from error
    options = PublishedOptions(
        concept=concept, replacement=replacement, cooldown=cooldown, alpha_scale=alpha_scale, mask_again=mask_again
    )
    bundle = BundleOptions(name=name or checkpoint.stem, max_batch=max_batch)
    with progress("exporting") as on_step:
        folder = import_checkpoint(checkpoint, out, options, bundle, model=model, on_step=on_step, on_note=_say)
    console.print(f"{folder}: {_megabytes(folder)}")


def build_plans(
    bundle: Annotated[str, typer.Argument(help="Bundle folder, or an embedded one's name.")] = DEFAULT_BUNDLE,
    digest: DigestOption = None,
    target: Annotated[str, typer.Option(help="tensorrt-rtx (builds on any machine) or tensorrt (on the GPU it is for).")] = (
        "tensorrt-rtx"
    ),
    engine: Annotated[list[str] | None, typer.Option(help="Engine to build, again for more; all that draw by default.")] = None,
    batch: Annotated[str, typer.Option(help="SMALLEST:LIKELIEST:LARGEST batch of a call.")] = "1:4:8",
    compute_capability: Annotated[
        list[str] | None, typer.Option(help="Such as 8.9, again for more; portable from 8.0 on by default.")
    ] = None,
    strip_weights: Annotated[
        bool, typer.Option("--strip-weights", help="Leave weights out, to be taken from the bundle. Needs a GPU to build.")
    ] = False,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder of plans; the user's cache by default.")] = None,
    in_bundle: Annotated[bool, typer.Option("--in-bundle", help="Keep the plans in the bundle's own folder.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Compile engines ahead of time. What is there already, for exactly this, is left. Needs `saferedir[tensorrt]`.

    Examples:

    `saferedir build-plans emoji-diffusion --batch 1:1:8`

    `saferedir build-plans bundle --compute-capability 8.9 --compute-capability 12.0 --in-bundle --json`
    """
    from saferedir.engines import open_bundle
    from saferedir.engines.plan_cache import PlanCache, user_cache
    from saferedir.export.plan_builder import PlanOptions
    from saferedir.export.plan_builder import build_plans as build

    if out is not None and in_bundle:
        raise RequestError("give --out or --in-bundle, not both")
    options = PlanOptions(
        builder=target, batch=_batch(batch), compute_capabilities=tuple(compute_capability or ()),
        strip_weights=strip_weights,
    )  # fmt: skip
    opened = open_bundle(bundle, digest=digest)
    folder = opened.folder / "plans" if in_bundle else user_cache() if out is None else out.resolve()
    cache = PlanCache(folder)
    with progress("building") as on_plan:
        plans = build(opened, options, cache, tuple(engine) if engine else None, on_plan=on_plan, on_wait=_say_waiting)
    if as_json:
        print_json([{**asdict(plan), "path": str(plan.path)} for plan in plans])
        return
    table = Table("engine", "MB", "seconds", "", "plan")
    for plan in plans:
        how = "built" if plan.built else "was there"
        table.add_row(plan.engine, f"{plan.bytes / 1e6:.1f}", f"{plan.seconds:.1f}", how, str(plan.path))
    console.print(table)


def _plan_options(target: str, batch: str) -> list[PlanOptions]:
    """What plans `--target` asks for beside the graphs; checked before anything is exported."""
    onnx, *builders = [part.strip() for part in target.split(",")]
    if onnx != "onnx":
        raise RequestError(
            f"--target is {target!r}; expected onnx first, from which all else is made, such as onnx,tensorrt-rtx"
        )
    if not builders:
        return []
    from saferedir.export.plan_builder import PlanOptions

    wanted = [PlanOptions(builder=builder, batch=_batch(batch)) for builder in builders]
    for options in wanted:
        options.check()
    return wanted


def _build_in_bundle(folder: Path, options: PlanOptions) -> None:
    from saferedir.engines import open_bundle
    from saferedir.engines.plan_cache import PlanCache
    from saferedir.export.plan_builder import build_plans as build

    with progress(f"building for {options.builder}") as on_plan:
        build(open_bundle(folder), options, PlanCache(folder / "plans"), on_plan=on_plan, on_wait=_say_waiting)


def _lora(text: str) -> tuple[Path, float]:
    path, colon, scale = text.rpartition(":")
    if not colon or Path(text).exists():
        return Path(text), 1.0
    try:
        return Path(path), float(scale)
    except ValueError:
        raise RequestError(f"--lora is {text!r}; expected FILE or FILE:SCALE, such as details.safetensors:0.8") from None


def _named_word(text: str) -> tuple[Path, str | None]:
    path, colon, word = text.rpartition(":")
    if not colon or Path(text).exists():
        return Path(text), None
    if not path or not word:
        raise RequestError(f"--textual-inversion is {text!r}; expected FILE or FILE:WORD, such as embedding.pt:glow")
    return Path(path), word


def _say_size(size: int) -> None:
    _say(f"about {size / 1e6:.1f} MB will be written")


def _say(note: str) -> None:
    typer.echo(note, err=True)


def _say_waiting() -> None:
    _say("another process builds this plan; waiting for it")


def _batch(text: str) -> tuple[int, int, int]:
    try:
        low, likely, high = (int(part) for part in text.split(":"))
    except ValueError:
        raise RequestError(f"batch is {text!r}; expected SMALLEST:LIKELIEST:LARGEST, such as 1:4:8") from None
    return low, likely, high


def _megabytes(folder: Path) -> str:
    return f"{sum(path.stat().st_size for path in folder.rglob('*') if path.is_file()) / 1e6:.1f} MB"
