"""A bundle: one self-describing folder of engines, checked when it is opened."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from saferedir.engines.errors import (
    BundleAlteredError,
    BundleError,
    BundleMissingFileError,
    SafetyMismatchError,
    SafetyMissingError,
)
from saferedir.engines.manifest import MANIFEST_FILE, PROTECTED_STEPS, SAFETY_ENGINES, TOKENIZER_FILE, Manifest, kind

#: Bundles that ship inside the package, by name.
EMBEDDED = {"emoji-diffusion": "emoji_diffusion"}
DEFAULT_BUNDLE = "emoji-diffusion"


@dataclass(frozen=True)
class Bundle:
    """An opened bundle: its folder and what its manifest says."""

    folder: Path
    manifest: Manifest

    def engine_path(self, name: str) -> Path:
        """Path of an engine's ONNX file.

        Raises:
            BundleError: there is no such engine; SafetyMissingError where it holds the safety.
        """
        try:
            return self.folder / self.manifest.engines[name].file
        except KeyError:
            raise _missing_engine(name, self.folder) from None

    @property
    def tokenizer_path(self) -> Path:
        return self.folder / TOKENIZER_FILE


def open_bundle(path_or_name: str | Path, *, check_hashes: bool = True) -> Bundle:
    """The bundle in a folder, or the embedded one of that name, after checking that it is whole.

    Every listed file must be there with its size and SHA-256, every required engine be listed, and the safety engine
    be made for this model. `check_hashes=False` skips reading the files (sizes are compared all the same).

    Raises:
        BundleMissingFileError, BundleAlteredError, BundleSchemaError: each names the file.
        SafetyMissingError, SafetyMismatchError: there is no safety engine, or it is another model's.
    """
    folder = locate(path_or_name)
    manifest_path = folder / MANIFEST_FILE
    if not manifest_path.is_file():
        raise BundleMissingFileError(f"{manifest_path} is missing; {folder} is not a bundle")
    manifest = Manifest.from_json(manifest_path.read_text(encoding="utf-8"), str(manifest_path))
    for name in manifest.required_engines:
        if name not in manifest.engines:
            raise _missing_engine(name, folder)
    for name, engine in manifest.engines.items():
        for file in (engine.file, *engine.weights):
            if file not in manifest.files:
                raise BundleAlteredError(f"{manifest_path}: engine {name!r} uses {file}, which has no hash")
    if manifest.model is not None and TOKENIZER_FILE not in manifest.files:
        raise BundleAlteredError(f"{manifest_path} lists no {TOKENIZER_FILE}")
    for name, info in manifest.files.items():
        _check_file(folder, name, info.bytes, info.sha256 if check_hashes else None)
    _check_safety(manifest, folder)
    return Bundle(folder, manifest)


def locate(path_or_name: str | Path) -> Path:
    """The folder of a bundle given by path, or by the name of an embedded one."""
    if str(path_or_name) in EMBEDDED:
        return Path(__file__).parent / EMBEDDED[str(path_or_name)]
    folder = Path(path_or_name)
    if not folder.is_dir():
        raise BundleMissingFileError(f"{folder} is neither a bundle folder nor one of {', '.join(EMBEDDED)}")
    return folder


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_file(folder: Path, name: str, size: int, sha256: str | None) -> None:
    path = folder / name
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise BundleAlteredError(f"{name} lies outside of the bundle {folder}")
    if not path.is_file():
        raise BundleMissingFileError(f"{path} is missing; restore the bundle or export it again")
    if path.stat().st_size != size:
        raise BundleAlteredError(f"{path} has {path.stat().st_size} bytes, the manifest says {size}; restore the bundle")
    if sha256 is not None and (found := file_sha256(path)) != sha256:
        raise BundleAlteredError(f"{path} has SHA-256 {found}, the manifest says {sha256}; restore the bundle")


def _check_safety(manifest: Manifest, folder: Path) -> None:
    model, safety = manifest.model, manifest.safety
    if not safety.concepts:
        raise SafetyMissingError(f"{folder}: the safety engine knows no concept")
    if model is None:
        return
    facts = {
        "prompt width": (safety.prompt_width, model.prompt_width),
        "latent channels": (safety.latent_channels, model.latent_channels),
        "text encoder": (safety.text_encoder_sha256, model.text_encoder_sha256),
    }
    for fact, (made_for, found) in facts.items():
        if made_for != found:
            raise SafetyMismatchError(f"{folder}: the safety engine is made for {fact} {made_for}, the model has {found}")


def _missing_engine(name: str, folder: Path) -> BundleError | SafetyMissingError:
    message = f"{folder / MANIFEST_FILE} lists no engine {name!r}; export the bundle again"
    return SafetyMissingError(message) if kind(name) in (*PROTECTED_STEPS, *SAFETY_ENGINES) else BundleAlteredError(message)
