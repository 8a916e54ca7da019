"""Which model families can be protected, known by the files of a diffusers folder, and why others cannot."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saferedir.engines.errors import RequestError
from saferedir_torch.pixart import PROMPT_TOKENS


@dataclass(frozen=True)
class Family:
    """A kind of model that the exporter knows."""

    name: str
    #: Classes of the pipeline, as `model_index.json` names them.
    pipelines: tuple[str, ...]
    #: Whether a denoiser's configuration is of this family, asked in the order of the families.
    matches: Callable[[Mapping[str, Any]], bool]
    #: Folder of the denoiser.
    denoiser: str = "unet"
    #: Channels that it gives for each that it takes.
    gives: int = 1


STABLE_DIFFUSION = ("StableDiffusionPipeline", "LatentConsistencyModelPipeline")
#: Pipelines that begin with a picture, and those of the same parts; an inpainting UNet is told by its channels.
ALIKE = {
    "StableDiffusionImg2ImgPipeline": "StableDiffusionPipeline",
    "StableDiffusionInpaintPipeline": "StableDiffusionPipeline",
    "StableDiffusionInpaintPipelineLegacy": "StableDiffusionPipeline",
    "LatentConsistencyModelImg2ImgPipeline": "LatentConsistencyModelPipeline",
}
FAMILIES = (
    Family("pixart", tuple(PROMPT_TOKENS), lambda config: bool(config.get("caption_channels")), "transformer", gives=2),
    Family("latent-consistency", STABLE_DIFFUSION, lambda unet: bool(unet.get("time_cond_proj_dim"))),
    Family("stable-diffusion-2.x", STABLE_DIFFUSION, lambda unet: unet.get("cross_attention_dim") == 1024),
    Family("stable-diffusion-1.x", STABLE_DIFFUSION, lambda unet: True),
)
#: Pipelines that redirection would not protect, or not wholly.
REFUSED = {
    "StableDiffusionXLPipeline": "its UNet is also conditioned by a pooled embedding, past cross-attention, which redirection "
    "does not reach",
    "StableDiffusion3Pipeline": "text and picture attend to each other jointly, and a pooled embedding conditions every block",
    "FluxPipeline": "text and picture attend to each other jointly, and a pooled embedding conditions every block",
}


def family_of(folder: Path) -> Family:
    """The family of the model in a diffusers folder.

    Raises:
        RequestError: it is no diffusers folder, or its family is not known or cannot be protected.
    """
    index = _read(folder / "model_index.json", folder)
    kind = str(index.get("_class_name"))
    kind = ALIKE.get(kind, kind)
    if kind in REFUSED:
        raise RequestError(f"{folder} is a {kind}, which is refused: {REFUSED[kind]}")
    names = {name for family in FAMILIES for name in family.pipelines}
    if kind not in names:
        raise RequestError(f"{folder} is a {kind}, which is not known here; known: {', '.join(sorted(names))}")
    denoiser, gives = next((own.denoiser, own.gives) for own in FAMILIES if kind in own.pipelines)
    config = _read(folder / denoiser / "config.json", folder)
    if gives > 1 and config.get("out_channels") == gives * config.get("in_channels", 0):
        config["out_channels"] = config["in_channels"]  # the others are its variance, which is left out
    return checked_unet(config, folder)


def checked_unet(unet: Mapping[str, Any], source: Path) -> Family:
    """The family of a Stable Diffusion model, read from `source`, whose UNet has this configuration.

    Raises:
        RequestError: it cannot be protected.
    """
    if (channels := unet.get("in_channels")) != (given := unet.get("out_channels")):
        raise RequestError(
            f"{source} takes {channels} latent channels and gives {given}; inpainting and image-conditioned models are not "
            "known here"
        )
    if further := [name for name in ("addition_embed_type", "class_embed_type") if unet.get(name)]:
        raise RequestError(
            f"{source} is conditioned by more than cross-attention and the timestep ({', '.join(further)}), which redirection "
            "does not reach"
        )
    return family_of_unet(unet)


def family_of_unet(config: Mapping[str, Any]) -> Family:
    """The family of a Stable Diffusion pipeline whose UNet has this configuration."""
    return next(family for family in FAMILIES if family.matches(config))


def _read(path: Path, folder: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RequestError(
            f"{folder} holds no readable {path.relative_to(folder)}; expected a diffusers folder of Stable Diffusion"
        ) from error
    if not isinstance(raw, dict):
        raise RequestError(f"{path} is no JSON object")
    return raw
