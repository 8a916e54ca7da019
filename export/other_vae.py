"""Another VAE in a model's place: a diffusers folder, or one file in diffusers' or the original layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

from saferedir.engines.errors import RequestError
from saferedir.export.tensor_files import check_numbers, read_tensors
from saferedir_torch.model_source import open_part

#: Names of the VAE's tensors in a whole checkpoint begin so.
IN_CHECKPOINT = "first_stage_model."
#: Of its training, which nothing is drawn with.
OF_TRAINING = ("loss.", "model_ema.")


def open_vae(path: Path, own: Any) -> Any:
    """The VAE in `path`, in fp32. A file has no configuration: it is taken to be that of the model's `own` VAE.

    Raises:
        RequestError: there is none, it is of another kind, lacks weights or has others, or has other latent channels.
    """
    if not path.exists():
        raise RequestError(f"{path} does not exist; expected a VAE, as a diffusers folder or one .safetensors file")
    vae = open_part(AutoencoderKL, path) if path.is_dir() else _of_file(path, own)
    if (found := vae.config.latent_channels) != (expected := own.config.latent_channels):
        raise RequestError(f"{path} cannot be used as a VAE here: it has {found} latent channels, the model {expected}")
    return vae.eval()


def _of_file(path: Path, own: Any) -> Any:
    tensors = read_tensors(path, "VAE")
    if any(name.startswith(IN_CHECKPOINT) for name in tensors):
        tensors = {name: tensor for name, tensor in tensors.items() if name.startswith(IN_CHECKPOINT)}
    tensors = {name.removeprefix(IN_CHECKPOINT): tensor for name, tensor in tensors.items()}
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(OF_TRAINING)}
    check_numbers(tensors, path)
    vae = AutoencoderKL.from_config(own.config)
    try:
        if any(".mid.block_1." in name for name in tensors):
            tensors = convert_ldm_vae_checkpoint(tensors, own.config)
        vae.load_state_dict(tensors)
    except (RuntimeError, KeyError, IndexError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise RequestError(
            f"{path} cannot be used as a VAE here, in place of one configured as the model's: {reason}"
        ) from error
    return vae
