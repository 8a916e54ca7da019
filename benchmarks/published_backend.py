"""The published controller around the deployed UNet: it looks after the UNet call, and moves both halves of guidance."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from saferedir.runtime.backend import Call, DeviceTensor
from saferedir.runtime.ort import OrtBackend
from saferedir_torch.published import PublishedNetwork, PublishedOutput, published_step


class PublishedBackend(OrtBackend):
    """ONNX Runtime for the model, `network` in eager PyTorch after every plain step. Knows one concept."""

    def __init__(self, bundle: Any, network: PublishedNetwork, threads: int | None = None) -> None:
        super().__init__(bundle, "ort-cpu", threads=threads)
        self.network = network.eval()
        self._negatives: dict[int, torch.Tensor] = {}

    def bind(self, engine: str, inputs: Mapping[str, DeviceTensor], outputs: Mapping[str, DeviceTensor]) -> Call:
        if engine not in ("step", "step_unguided"):
            return super().bind(engine, inputs, outputs)
        plain = super().bind(f"plain_{engine}", inputs, outputs)
        # The unconditional half is a constant of the loop, so what was before it moved is kept here.
        negative = inputs["negative"]
        self._negatives.setdefault(id(negative), torch.from_numpy(negative.numpy().copy()))

        @torch.no_grad()
        def call() -> None:
            plain()
            read = {
                name: torch.from_numpy(inputs[name].numpy())
                for name in ("latent", "input_scale", "timestep", "prompt", "original", "cooldown", "period", "active",
                             "ok", "enabled", "alpha_scale")
            }  # fmt: skip
            seen = read["latent"] * read["input_scale"][:, None, None, None]
            output: PublishedOutput = self.network(seen, read["prompt"], read["timestep"])
            watching = read["cooldown"] <= 0
            unsafe = (output.logits.argmax(dim=1) == 1) & watching & read["enabled"][:, 0]
            chosen = unsafe[:, None, None]
            strength = float(read["alpha_scale"].max())
            moved = torch.where(chosen, published_step(read["original"], output, strength), read["prompt"])
            before = torch.from_numpy(negative.numpy())
            other = torch.where(chosen, published_step(self._negatives[id(negative)], output, strength), before)
            negative.update_inplace(np.ascontiguousarray(other.numpy()))
            rested = torch.where(watching, read["cooldown"], read["cooldown"] - 1)
            fired = unsafe[:, None]
            active = read["active"] | fired
            results = {
                "next_prompt": moved,
                "next_cooldown": torch.where(unsafe, read["period"], rested),
                "next_active": active,
                "next_ok": read["ok"] & torch.isfinite(moved).flatten(1).all(dim=1),
                "score": output.logits.softmax(dim=1)[:, 1:],
                "fired": fired,
                "token_mask": torch.where(active[:, :, None], output.mask[:, None], torch.zeros_like(output.mask[:, None])),
            }
            for name, tensor in results.items():
                outputs[name].update_inplace(np.ascontiguousarray(tensor.numpy()))

        return call
