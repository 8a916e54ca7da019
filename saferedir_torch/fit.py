"""Whether a safety module fits a pipeline: the same shapes, noise schedule and text encoder.

A module reads what one text encoder makes of prompts, so it fits that encoder alone. The same weights in another precision, or
with words added to them, are the same encoder.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from saferedir.engines.errors import SafetyMismatchError
from saferedir_torch.config import SafetyConfig
from saferedir_torch.safety_module import SafetyModule

#: How far signal shares may lie from the module's, which are rounded on disk.
SCHEDULE_TOLERANCE = 1e-3
#: The least magnitude that fp16 holds in full precision. What is smaller counts as zero: bf16 and fp16 round it differently.
SMALLEST = 2.0**-14
#: Values of every parameter that are looked at before each call, to notice that an encoder was changed.
PROBES = 16


class EncoderHashes(NamedTuple):
    """SHA-256 over a text encoder's weights in bf16, of the words that its tokenizer was made with.

    Rounding twice is not rounding once, so there is one hash of weights that were fp16 on their way and one of weights that
    were not. Two encoders of which one was cast from the other, in whatever steps through fp32, fp16 and bf16, share a hash.
    Weights that differ in anything else share none, but for a difference that no rounding shows.
    """

    through_fp16: str
    direct: str


def encoder_hashes(pipeline: Any) -> EncoderHashes:
    """The hashes of the text encoder of `pipeline`.

    Raises:
        SafetyMismatchError: its weights are not in memory.
    """
    through_fp16, direct = hashlib.sha256(), hashlib.sha256()
    for weight in _weights(pipeline):
        half, precise = weight.to("cpu", torch.float16), weight.to("cpu", torch.float32)
        for digest, values in ((through_fp16, half.float()), (direct, precise)):
            rounded = values.bfloat16()
            kept = torch.where(rounded.abs() < SMALLEST, 0, rounded).contiguous()
            digest.update(repr(tuple(kept.shape)).encode())
            digest.update(kept.view(torch.int16).numpy().tobytes())
    return EncoderHashes(through_fp16.hexdigest(), direct.hexdigest())


def _weights(pipeline: Any) -> Iterator[Tensor]:
    """In the order of their names, which versions of transformers prefix differently; without the rows of added words."""
    encoder, words = pipeline.text_encoder, pipeline.tokenizer.vocab_size
    vocabulary = encoder.get_input_embeddings().weight
    for _, weight in sorted(encoder.named_parameters()):
        if weight.is_meta:
            raise SafetyMismatchError(
                "text encoder: its weights are not in memory (sequential offloading); use enable_model_cpu_offload instead"
            )
        yield (weight[:words] if weight is vocabulary else weight).detach()


class Fit:
    """A safety module beside one text encoder, which is read in full when it is first met and when it has changed since."""

    def __init__(self, safety: SafetyModule) -> None:
        self.safety = safety
        self._met: Tensor | None = None

    def check(self, pipeline: Any) -> None:
        """Raise `SafetyMismatchError` unless the safety module was made for the text encoder and the shapes of `pipeline`."""
        config, scheduler = self.safety.config, pipeline.scheduler
        facts = {
            "latent channels": (config.latent_channels, pipeline.unet.config.in_channels),
            "prompt tokens": (config.prompt_tokens, pipeline.tokenizer.model_max_length),
            "prompt width": (config.prompt_width, pipeline.unet.config.cross_attention_dim),
            "prediction type": (config.prediction_type, getattr(scheduler.config, "prediction_type", "none")),
        }
        for fact, (expected, found) in facts.items():
            if expected != found:
                raise SafetyMismatchError(f"{fact}: the safety module is made for {expected}, the pipeline has {found}")
        self._check_encoder(pipeline)
        if config.alone:
            self._check_schedule(scheduler)

    def _check_encoder(self, pipeline: Any) -> None:
        probe = _probe(pipeline)
        if self._met is not None and torch.equal(probe, self._met):
            return
        hashes = encoder_hashes(pipeline)
        if made_for(self.safety.config).isdisjoint(hashes):
            expected = self.safety.config.text_encoder_sha256
            raise SafetyMismatchError(
                f"text encoder: the safety module is made for {expected}, the pipeline has {hashes.through_fp16}"
            )
        self._met = probe

    def _check_schedule(self, scheduler: Any) -> None:
        alphas = self.safety.alphas
        shares = getattr(scheduler, "alphas_cumprod", torch.ones(0)).to(alphas)
        off = float((shares - alphas).abs().max()) if shares.shape == alphas.shape else 1.0
        if off > SCHEDULE_TOLERANCE:
            raise SafetyMismatchError(f"noise schedule: signal shares differ by up to {off:.2g} from the safety module's")


def check_match(pipeline: Any, safety: SafetyModule) -> None:
    """Raise `SafetyMismatchError` unless `safety` was made for the text encoder and the shapes of `pipeline`."""
    Fit(safety).check(pipeline)


def made_for(config: SafetyConfig) -> frozenset[str]:
    """Hashes of the text encoder that a module of this configuration fits."""
    return frozenset({config.text_encoder_sha256, config.text_encoder_direct_sha256}) - {""}


def _probe(pipeline: Any) -> Tensor:
    """A few values of every weight, [V] fp32."""
    flat = (weight.flatten() for weight in _weights(pipeline))
    return torch.cat([values[:: max(1, len(values) // PROBES)].to("cpu", torch.float32) for values in flat])
