"""Files of tensors that others made, read without running anything that is in them."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from saferedir.engines.errors import RequestError

#: What tells a file of tensors that may not be opened as code.
PICKLES = (".pt", ".bin", ".pth", ".ckpt")
NUMBERS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def read_tensors(path: Path, what: str) -> dict[str, Any]:
    """What a `.safetensors` file holds by name, or the dictionary in one that `torch.save` wrote.

    Raises:
        RequestError: there is no such file, it is damaged, or it holds more than tensors; `what` says what was expected.
    """
    if not path.is_file():
        raise RequestError(
            f"{path} does not exist; expected a {what}" if not path.exists() else f"{path} is no file of a {what}"
        )
    try:
        if path.suffix not in PICKLES:
            with safe_open(path, "pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, ValueError, RuntimeError, EOFError, KeyError, SafetensorError, pickle.UnpicklingError) as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise RequestError(f"{path} is no readable {what}: {reason}") from error
    if not isinstance(found, Mapping):
        raise RequestError(f"{path} holds a {type(found).__name__}; expected a {what}, which is a dictionary of tensors")
    return dict(found)


def read_metadata(path: Path) -> dict[str, str]:
    """What a `.safetensors` file says of itself; nothing for other files."""
    if path.suffix in PICKLES:
        return {}
    with safe_open(path, "pt") as file:
        return file.metadata() or {}


def check_numbers(tensors: Mapping[str, Any], path: Path) -> None:
    """Raise `RequestError` where one of the file at `path` is no dense tensor of finite numbers that lie in the file."""
    for name, tensor in tensors.items():
        dense = isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided and tensor.device.type == "cpu"
        if (
            dense
            and tensor.dtype in NUMBERS
            and tensor.nbytes <= tensor.untyped_storage().nbytes()
            and bool(tensor.isfinite().all())
        ):
            continue
        raise RequestError(f"{path}: {str(name)[:100]} is no tensor of finite numbers")
