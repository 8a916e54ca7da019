"""Pipelines as their trainers publish them: all parts in one file, under the names of the original code."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
    "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
UNET_ENDS = {
    "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
}  # fmt: skip


def save_single_file(pipeline: Any, path: Path) -> Path:
    """Write the weights of `pipeline` to one file."""
    tensors = {f"model.diffusion_model.{_unet_name(key, pipeline.unet.config)}": value
               for key, value in pipeline.unet.state_dict().items()}  # fmt: skip
    levels = len(pipeline.vae.config.block_out_channels)
    tensors |= {f"first_stage_model.{_vae_name(key, levels)}": value for key, value in pipeline.vae.state_dict().items()}
    for key, value in pipeline.text_encoder.state_dict().items():
        tensors[f"cond_stage_model.transformer.text_model.{key.removeprefix('text_model.')}"] = value
    save_file({key: value.contiguous().clone() for key, value in tensors.items()}, path)
    return path


def _unet_name(key: str, config: Any) -> str:
    for ours, theirs in UNET_ENDS.items():
        if key.startswith(f"{ours}."):
            return theirs + key.removeprefix(ours)
    layers, levels = config.layers_per_block, len(config.block_out_channels)
    if found := re.match(r"mid_block\.(resnets|attentions)\.(\d)\.(.*)", key):
        kind, index, rest = found.groups()
        place = 1 if kind == "attentions" else 2 * int(index)
        return f"middle_block.{place}.{rest if kind == 'attentions' else _resnet_name(rest)}"
    found = re.match(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.*)", key)
    assert found is not None, key
    side, level, kind, index, rest = found[1], int(found[2]), found[3], int(found[4]), found[5]
    if side == "down":
        block = 1 + level * (layers + 1) + (layers if kind == "downsamplers" else index)
        if kind == "downsamplers":
            return f"input_blocks.{block}.0.op.{rest.removeprefix('conv.')}"
        return f"input_blocks.{block}.{'1.' + rest if kind == 'attentions' else '0.' + _resnet_name(rest)}"
    block = level * (layers + 1) + (layers if kind == "upsamplers" else index)
    if kind == "upsamplers":
        attends = config.up_block_types[level].startswith("CrossAttn")
        return f"output_blocks.{block}.{2 if attends else 1}.{rest}"
    assert level < levels
    return f"output_blocks.{block}.{'1.' + rest if kind == 'attentions' else '0.' + _resnet_name(rest)}"


def _resnet_name(rest: str) -> str:
    part, _, kind = rest.rpartition(".")
    return f"{RESNET[part]}.{kind}"


def _vae_name(key: str, levels: int) -> str:
    key = key.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
    key = re.sub(r"mid_block\.resnets\.(\d)", lambda found: f"mid.block_{int(found[1]) + 1}", key)
    key = re.sub(r"down_blocks\.(\d)\.resnets", r"down.\1.block", key)
    key = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", key)
    key = re.sub(r"up_blocks\.(\d)\.resnets", lambda found: f"up.{levels - 1 - int(found[1])}.block", key)
    return re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda found: f"up.{levels - 1 - int(found[1])}.upsample", key)
