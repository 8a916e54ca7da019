"""The published method in float64 numpy, transcribed from its description and sharing no line with the product.

Parameters are a mapping of the checkpoint's names to arrays.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Parameters = Mapping[str, Array]
EPSILON = 1e-5


def network(w: Parameters, z: Array, p: Array, t: Array) -> dict[str, Array]:
    """z [B, 4, h, w], p [B, 77, D] conditional, t [B] -> logits, delta, mask, alpha."""
    x = z
    for block in range(3):
        x = _block(w, f"latent_encoder.{block}", x)
    latent = np.maximum(_linear(w, "latent_encoder.5", x.mean(axis=(2, 3))), 0)
    f = np.exp(-np.log(10_000.0) * np.arange(160) / 160)
    angle = t[:, None] * f[None]
    h = _linear(w, "t_encoder.0", np.concatenate([np.sin(angle), np.cos(angle)], axis=1))
    time = _layer_norm(w, "t_encoder.2", h / (1 + np.exp(-h)))
    j = np.concatenate([latent, time], axis=1)

    heads = []
    for index in range(4):
        name = f"cross_attn.heads.{index}"
        q, k, v = _linear(w, f"{name}.query", j), _linear(w, f"{name}.key", p), _linear(w, f"{name}.value", p)
        a = _softmax(np.einsum("bd,btd->bt", q, k) / np.sqrt(768.0))
        heads.append(_layer_norm(w, f"{name}.norm", np.einsum("bt,btd->bd", a, v) + v.mean(axis=1)))
    c = _layer_norm(w, "cross_attn.fuse.1", _linear(w, "cross_attn.fuse.0", np.concatenate(heads, axis=1)))

    hidden = np.maximum(_linear(w, "classifier.0", np.concatenate([j, p.mean(axis=1), c], axis=1)), 0)
    logits = _linear(w, "classifier.3", hidden)

    shared = _linear(w, "token_proj.2", np.maximum(_linear(w, "token_proj.0", np.concatenate([j, c], axis=1)), 0))
    shared = shared @ w["delta_head.down.weight"].T @ w["delta_head.up.weight"].T * w["delta_head.scale"]
    gate = _sigmoid(_linear(w, "gate_linear", p + w["pos_embed"]))[..., 0]
    mask = _mask(w, p)
    delta = shared[:, None, :] * (gate * mask)[:, :, None]
    alpha = _sigmoid(_linear(w, "alpha_predictor.net.2", np.maximum(_linear(w, "alpha_predictor.net.0", p), 0)))
    return {"logits": logits, "delta": delta, "mask": mask, "alpha": alpha}


@dataclass
class Controller:
    """One request: `original` [halves, 77, D], unconditional first where there are two."""

    parameters: Parameters
    original: Array
    period: int
    alpha_scale: float
    mask_again: bool = False
    counter: int = 0
    fired: list[bool] = field(default_factory=list)
    margins: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.in_force = self.original.copy()

    def after_unet(self, z: Array, t: float) -> None:
        """z [4, h, w] and t as the UNet saw them."""
        if self.counter > 0:
            self.counter -= 1
            self.fired.append(False)
            return
        said = network(self.parameters, z[None], self.in_force[-1:], np.array([t]))
        safe, unsafe = said["logits"][0]
        self.margins.append(abs(unsafe - safe))
        self.fired.append(bool(unsafe > safe))
        if unsafe <= safe:
            return
        delta = said["delta"][0]
        u = delta / np.maximum(np.linalg.norm(delta, axis=1, keepdims=True), 1e-12)
        step = self.alpha_scale * said["alpha"][0] * u
        if self.mask_again:
            step = step * said["mask"][0][:, None]
        self.in_force = self.original + step[None] * np.linalg.norm(self.original, axis=2, keepdims=True)
        self.counter = self.period


def _block(w: Parameters, name: str, x: Array) -> Array:
    y = np.maximum(_batch_norm(w, f"{name}.conv.1", _conv3x3(w, f"{name}.conv.0", x)), 0)
    y = _batch_norm(w, f"{name}.conv.4", _conv3x3(w, f"{name}.conv.3", y))
    kernel, bias = w[f"{name}.downsample.weight"][:, :, 0, 0], w[f"{name}.downsample.bias"]
    return np.maximum(y + np.einsum("oc,bchw->bohw", kernel, x) + bias[:, None, None], 0)


def _conv3x3(w: Parameters, name: str, x: Array) -> Array:
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    height, width = x.shape[2:]
    total: Any = w[f"{name}.bias"][None, :, None, None]
    for row in range(3):
        for column in range(3):
            seen = padded[:, :, row : row + height, column : column + width]
            total = total + np.einsum("oc,bchw->bohw", w[f"{name}.weight"][:, :, row, column], seen, optimize=True)
    return np.asarray(total)


def _batch_norm(w: Parameters, name: str, x: Array) -> Array:
    mean, variance = w[f"{name}.running_mean"], w[f"{name}.running_var"]
    scale = w[f"{name}.weight"] / np.sqrt(variance + EPSILON)
    return (x - mean[:, None, None]) * scale[:, None, None] + w[f"{name}.bias"][:, None, None]


def _layer_norm(w: Parameters, name: str, x: Array) -> Array:
    centred = x - x.mean(axis=-1, keepdims=True)
    spread = np.sqrt((centred**2).mean(axis=-1, keepdims=True) + EPSILON)
    return centred / spread * w[f"{name}.weight"] + w[f"{name}.bias"]


def _linear(w: Parameters, name: str, x: Array) -> Array:
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def _mask(w: Parameters, p: Array) -> Array:
    width = p.shape[2]
    q, k, v = np.split(p @ w["mask_predictor.attn.in_proj_weight"].T + w["mask_predictor.attn.in_proj_bias"], 3, axis=2)
    heads = []
    for index in range(4):
        part = slice(index * width // 4, (index + 1) * width // 4)
        a = _softmax(np.einsum("bid,bjd->bij", q[..., part], k[..., part]) / np.sqrt(width / 4))
        heads.append(np.einsum("bij,bjd->bid", a, v[..., part]))
    attended = _linear(w, "mask_predictor.attn.out_proj", np.concatenate(heads, axis=2))
    hidden = np.maximum(_linear(w, "mask_predictor.predictor.0", attended), 0)
    return _sigmoid(_linear(w, "mask_predictor.predictor.3", _layer_norm(w, "mask_predictor.predictor.2", hidden)))[..., 0]


def _softmax(x: Array) -> Array:
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def _sigmoid(x: Array) -> Array:
    return np.where(x >= 0, 1 / (1 + np.exp(-np.abs(x))), np.exp(-np.abs(x)) / (1 + np.exp(-np.abs(x))))
