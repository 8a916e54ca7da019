"""A bundle: one self-describing folder of engines, checked when it is opened, and again whenever a file of it is used.

The bytes that are used are the bytes that were hashed: every file is read into memory, compared with the manifest and handed on
from there. What happens to the folder after that changes nothing.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import NamedTuple

from saferedir.engines.errors import (
    BundleAlteredError,
    BundleError,
    BundleMissingFileError,
    RequestError,
    SafetyMismatchError,
    SafetyMissingError,
)
from saferedir.engines.manifest import LARGEST_MANIFEST, MANIFEST_FILE, TOKENIZER_FILE, Manifest, TensorInfo, kind
from saferedir.engines.onnx_file import check_external_data
from saferedir.engines.step import PROTECTED_STEPS, SAFETY_ENGINES

#: Bundles that ship inside the package, by name.
EMBEDDED = {"emoji-diffusion": "emoji_diffusion"}
DEFAULT_BUNDLE = "emoji-diffusion"
#: The digest that an operator pins, where none is given otherwise.
DIGEST_VARIABLE = "SAFEREDIR_BUNDLE_DIGEST"


class EngineBytes(NamedTuple):
    """An engine as it was hashed: its graph, and each weight file that the graph may read."""

    graph: bytes
    weights: Mapping[str, bytes]


@dataclass(frozen=True)
class Bundle:
    """An opened bundle: its folder, what its manifest says, and the manifest's own SHA-256."""

    folder: Path
    manifest: Manifest
    digest: str

    def engine_path(self, name: str) -> Path:
        """Path of an engine's ONNX file, for messages; `engine` gives what is in it.

        Raises:
            BundleError: there is no such engine; SafetyMissingError where it holds the safety.
        """
        try:
            return self.folder / self.manifest.engines[name].file
        except KeyError:
            raise _missing_engine(name, self.folder) from None

    def engine(self, name: str) -> EngineBytes:
        """Graph and weights of an engine, read now and equal to their hashes.

        Raises:
            BundleError: there is no such engine, a file of it is missing or altered, or its graph reads others.
        """
        path, info = self.engine_path(name), self.manifest.engines[name]
        graph = self.read(info.file)
        check_external_data(graph, info.weights, str(path))
        return EngineBytes(graph, {file: self.read(file) for file in info.weights})

    def copy_engine(self, name: str, folder: Path) -> Path:
        """Write an engine as `engine` gives it to `folder`, for a builder that takes nothing but paths; gives the graph's path.

        Raises:
            BundleError: as `engine`.
        """
        graph, weights = self.engine(name)
        for file, data in weights.items():
            (folder / file).write_bytes(data)
        path = folder / self.manifest.engines[name].file
        path.write_bytes(graph)
        return path

    def read(self, file: str) -> bytes:
        """The bytes of a file that the manifest lists, which are the ones that it states.

        Raises:
            BundleMissingFileError, BundleAlteredError: the file is missing, or has other bytes.
        """
        info = self.manifest.files[file]
        with _opened(self.folder, file) as opened:
            _check_size(self.folder / file, opened, info.bytes)
            data = opened.read(info.bytes + 1)
        _check_hash(self.folder / file, hashlib.sha256(data).hexdigest(), info.sha256)
        return data


def open_bundle(path_or_name: str | Path, *, digest: str | None = None) -> Bundle:
    """The bundle in a folder, or the embedded one of that name, after checking that it is whole.

    Every listed file must be there with its size and SHA-256, the engines be exactly those that this version draws with and
    state exactly their tensors, and the safety be made for this model. `digest` is the SHA-256 of the manifest that the
    operator pins; by default that in `SAFEREDIR_BUNDLE_DIGEST`.

    Raises:
        BundleMissingFileError, BundleAlteredError, BundleSchemaError: each names the file; an altered one may be the manifest.
        SafetyMissingError, SafetyMismatchError: there is no safety engine, or it is another model's.
        RequestError: `digest` is no SHA-256.
    """
    folder = locate(path_or_name)
    path = folder / MANIFEST_FILE
    if not path.exists():
        raise BundleMissingFileError(f"{path} is missing; {folder} is not a bundle")
    with _opened(folder, MANIFEST_FILE) as opened:
        data = opened.read(LARGEST_MANIFEST + 1)
    found = hashlib.sha256(data).hexdigest()
    _check_digest(path, found, digest or os.environ.get(DIGEST_VARIABLE))
    manifest = Manifest.from_json(data, str(path))
    _check_safety(manifest, folder)
    _check_engines(manifest, folder)
    if manifest.model is not None and TOKENIZER_FILE not in manifest.files:
        raise BundleAlteredError(f"{path} lists no {TOKENIZER_FILE}")
    for name, info in manifest.files.items():
        with _opened(folder, name) as opened:
            _check_size(folder / name, opened, info.bytes)
            _check_hash(folder / name, hashlib.file_digest(opened, "sha256").hexdigest(), info.sha256)
    return Bundle(folder, manifest, found)


def locate(path_or_name: str | Path) -> Path:
    """The folder of a bundle given by path, or by the name of an embedded one."""
    if str(path_or_name) in EMBEDDED:
        # Resolved, since an editable install links to each file.
        return Path(__file__).resolve().parent / EMBEDDED[str(path_or_name)]
    folder = Path(path_or_name)
    try:
        found = folder.is_dir()
    except (OSError, ValueError):  # too long a name, or a NUL in it
        found = False
    if not found:
        raise BundleMissingFileError(f"{folder} is neither a bundle folder nor one of {', '.join(EMBEDDED)}")
    return folder


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _opened(folder: Path, name: str) -> BufferedReader:
    """A regular file of the bundle, open for reading; what a link leads to must lie in the bundle as well."""
    path = folder / name
    try:
        real = path.resolve(strict=True)
        if not real.is_relative_to(folder.resolve()):
            raise BundleAlteredError(f"{path} leads out of the bundle, to {real}; put the file itself there")
        # Without blocking, so that a pipe in a file's place is an error and no endless wait.
        opened = os.fdopen(os.open(real, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)), "rb")
    except FileNotFoundError:
        raise BundleMissingFileError(f"{path} is missing; restore the bundle or export it again") from None
    except (OSError, RuntimeError) as error:  # a loop of links is a RuntimeError
        raise BundleMissingFileError(f"{path} cannot be read ({error}); restore the bundle or export it again") from None
    if not stat.S_ISREG(os.fstat(opened.fileno()).st_mode):
        opened.close()
        raise BundleAlteredError(f"{path} is no regular file; restore the bundle")
    return opened


def _check_size(path: Path, opened: BufferedReader, stated: int) -> None:
    if (found := os.fstat(opened.fileno()).st_size) != stated:
        raise BundleAlteredError(f"{path} has {found} bytes, the manifest says {stated}; restore the bundle")


def _check_hash(path: Path, found: str, stated: str) -> None:
    if found != stated:
        raise BundleAlteredError(f"{path} has SHA-256 {found}, the manifest says {stated}; restore the bundle")


def _check_digest(path: Path, found: str, pinned: str | None) -> None:
    if pinned is None:
        return
    if not re.fullmatch("[0-9a-fA-F]{64}", pinned):
        raise RequestError(f"the bundle's digest is {pinned!r}; expected the 64 hexadecimal digits that `inspect` prints")
    if found != pinned.lower():
        raise BundleAlteredError(f"{path} has SHA-256 {found}, pinned is {pinned.lower()}; this is another bundle")


def _check_engines(manifest: Manifest, folder: Path) -> None:
    path, required = folder / MANIFEST_FILE, manifest.required_engines
    for name in required:
        if name not in manifest.engines:
            raise _missing_engine(name, folder)
    for name, engine in manifest.engines.items():
        if name not in required:
            raise BundleAlteredError(f"{path}: engine {name!r} is not one that is drawn with; export the bundle again")
        for file in (engine.file, *engine.weights):
            if file not in manifest.files:
                raise BundleAlteredError(f"{path}: engine {name!r} uses {file}, which has no hash")
        for what, stated, expected in zip(
            ("inputs", "outputs"), (engine.inputs, engine.outputs), manifest.tensors(name), strict=True
        ):
            check_tensors(f"{path}: {what} of engine {name!r}", stated, expected)


def check_tensors(where: str, found: tuple[TensorInfo, ...], expected: tuple[TensorInfo, ...]) -> None:
    """Raise `BundleAlteredError` where tensors are not exactly the expected ones, in name, type, shape and order."""
    if found == expected:
        return
    for index in range(max(len(found), len(expected))):
        one, other = (str(tensors[index]) if index < len(tensors) else "nothing" for tensors in (found, expected))
        if one != other:
            raise BundleAlteredError(f"{where}: {one} is stated where {other} is expected; export the bundle again")


def _check_safety(manifest: Manifest, folder: Path) -> None:
    model, safety = manifest.model, manifest.safety
    if not safety.concepts:
        raise SafetyMissingError(f"{folder}: the safety engine knows no concept")
    if model is None:
        return
    facts = {
        "prompt tokens": (safety.prompt_tokens, model.prompt_tokens),
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
