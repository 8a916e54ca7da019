"""Reads a checkpoint of the authors' released code, and says which parameter does not fit where one does not."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from saferedir.engines.errors import RequestError
from saferedir.engines.printable import printable
from saferedir_torch.published import PublishedNetwork

#: Keys under which trainers put the parameters, beside optimiser state and the like.
WRAPPERS = ("model_state_dict", "state_dict", "model")
#: What training on several devices puts before every name.
PARALLEL_PREFIX = "module."
TYPES = ("float16", "bfloat16", "float32", "float64", "int64")
#: So many names are listed in an error.
LISTED = 6


def load_published(path: Path) -> PublishedNetwork:
    """The network in `path`, in evaluation mode. Its prompt width is the checkpoint's (768 in the released ones).

    Nothing in the file is executed. Batch norm's count of batches may be absent, since inference does not read it.

    Raises:
        RequestError: the file is missing, unreadable or holds other objects than tensors; parameters are
            missing, unknown, of another shape, or not finite. The message names them.
    """
    state = _parameters(path)
    embed, conv = state.get("pos_embed"), state.get("latent_encoder.0.conv.0.weight")
    if embed is None or conv is None or embed.dim() != 3 or conv.dim() != 4 or embed.shape[2] % 4:
        raise RequestError(
            f"{path} is not of the published layout: pos_embed [1, tokens, width] and latent_encoder.0.conv.0.weight "
            f"[64, channels, 3, 3] are {_shape(embed)} and {_shape(conv)}"
        )
    shapes = {"tokens": embed.shape[1], "width": embed.shape[2], "channels": conv.shape[1]}
    with torch.device("meta"):  # shapes alone: memory is taken for what was found to fit
        wanted = PublishedNetwork(**shapes).state_dict()
    counts = {name for name in wanted if name.endswith("num_batches_tracked")}
    problems = [f"{name} is missing" for name in wanted if name not in state and name not in counts]
    problems += [f"{name} is unknown" for name in state if name not in wanted]
    problems += [
        f"{name} is {_shape(value)}, expected {_shape(wanted[name])}"
        for name, value in state.items()
        if name in wanted and value.shape != wanted[name].shape
    ]
    if not problems:
        problems = [f"{name} is not finite" for name, value in state.items() if not bool(torch.isfinite(value).all())]
    if problems:
        more = f", and {len(problems) - LISTED} more" if len(problems) > LISTED else ""
        raise RequestError(f"{path} is not of the published layout: {'; '.join(problems[:LISTED])}{more}")
    network = PublishedNetwork(**shapes)
    network.load_state_dict({name: value.to(wanted[name].dtype) for name, value in state.items()}, strict=False)
    return network.eval()


def _parameters(path: Path) -> dict[str, Tensor]:
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise RequestError(
            f"{path} holds more than tensors, or is no checkpoint, and is not opened: {_first_line(error)}"
        ) from error
    except Exception as error:  # torch's reader raises whatever its parts do
        raise RequestError(f"{path} cannot be read as a PyTorch checkpoint: {_first_line(error)}") from error
    for key in WRAPPERS:
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
            break
    if not isinstance(loaded, Mapping) or not loaded or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise RequestError(f"{path} holds no mapping of parameter names to tensors, nor one under {WRAPPERS}")
    for name, value in loaded.items():
        if (problem := _unusable(value)) is not None:
            expected = f"expected a plain tensor of one of {', '.join(TYPES)}"
            raise RequestError(f"{path}: {printable(str(name))} {problem}; {expected}")
    return {printable(str(name)).removeprefix(PARALLEL_PREFIX): value for name, value in loaded.items()}


def _unusable(tensor: Tensor) -> str | None:
    """What keeps a tensor from being looked at, or None; nothing is computed, and no memory taken."""
    if tensor.layout is not torch.strided:
        return "is sparse"
    if tensor.is_meta:
        return "has no data"
    if str(tensor.dtype).removeprefix("torch.") not in TYPES:
        return f"is of type {str(tensor.dtype).removeprefix('torch.')}"
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        return f"repeats itself, {_shape(tensor)} of {tensor.untyped_storage().nbytes()} bytes"
    return None


def _shape(tensor: Tensor | None) -> str:
    return "missing" if tensor is None else "x".join(map(str, tensor.shape)) or "a scalar"


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
