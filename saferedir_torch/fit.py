"""Whether a safety module fits a pipeline: the same shapes and text encoder, and noise levels that are known.

A module reads what one text encoder makes of prompts, so it fits that encoder alone. The same weights in another precision, or
with words added to them, are the same encoder.
"""

from __future__ import annotations

import hashlib
import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from saferedir.engines.errors import SafetyMismatchError
from saferedir_torch.config import SafetyConfig
from saferedir_torch.estimate import NoiseLevels
from saferedir_torch.safety_module import SafetyModule

#: The least magnitude that fp16 holds in full precision. What is smaller counts as zero: bf16 and fp16 round it differently.
SMALLEST = 2.0**-14
#: Integers as wide as floats of so many bytes.
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class EncoderHashes(NamedTuple):
    """SHA-256 over a text encoder's weights in bf16, of the words that its tokenizer was made with.

    Rounding twice is not rounding once, so there is one hash of weights that were fp16 on their way and one of weights that
    were not. Two encoders of which one was cast from the other, in whatever steps through fp32, fp16 and bf16, share a hash.
    Two that were cast from a third, which neither fp16 nor bf16 holds, one to each, share none. Nor do weights that differ in
    anything else, but for a difference that rounding to bf16 takes from every one of them.
    """

    through_fp16: str
    direct: str


#: Encoders that were read, by checksums of their weights: services protect pipelines for a request each.
_read: weakref.WeakKeyDictionary[nn.Module, tuple[list[int], EncoderHashes]] = weakref.WeakKeyDictionary()


def encoder_hashes(pipeline: Any) -> EncoderHashes:
    """The hashes of the text encoder of `pipeline`, which is read in full when it is first met and when it has changed since.

    Raises:
        SafetyMismatchError: its weights are not in memory.
    """
    weights = _weights(pipeline)
    sums = [_checksum(weight) for weight in weights]
    known = _read.get(pipeline.text_encoder)
    if known is None or known[0] != sums:
        known = _read[pipeline.text_encoder] = (sums, _hashes(weights))
    return known[1]


def check_match(pipeline: Any, safety: SafetyModule) -> None:
    """Raise `SafetyMismatchError` unless `safety` was made for the text encoder and the shapes of `pipeline`, whose scheduler
    tells how noisy latents are."""
    config = safety.config
    facts = {
        "latent channels": (config.latent_channels, pipeline.unet.config.in_channels),
        "streams of conditioning": (len(config.streams), 1),
        "prompt tokens": (config.streams[0].tokens, pipeline.tokenizer.model_max_length),
        "prompt width": (config.streams[0].width, pipeline.unet.config.cross_attention_dim),
    }
    for fact, (expected, found) in facts.items():
        if expected != found:
            raise SafetyMismatchError(f"{fact}: the safety module is made for {expected}, the pipeline has {found}")
    hashes = encoder_hashes(pipeline)
    if made_for(config).isdisjoint(hashes):
        raise SafetyMismatchError(
            f"text encoder: the safety module is made for {config.text_encoder_sha256}, the pipeline has {hashes.through_fp16}"
        )
    NoiseLevels(pipeline.scheduler)


def made_for(config: SafetyConfig) -> frozenset[str]:
    """Hashes of the text encoder that a module of this configuration fits."""
    return frozenset({config.text_encoder_sha256, config.text_encoder_direct_sha256}) - {""}


def _weights(pipeline: Any) -> list[Tensor]:
    """In the order of their names, which versions of transformers prefix differently; without the rows of added words."""
    encoder, words = pipeline.text_encoder, pipeline.tokenizer.vocab_size
    vocabulary = encoder.get_input_embeddings().weight
    weights = [weight for _, weight in sorted(encoder.named_parameters())]
    if any(weight.is_meta for weight in weights):
        raise SafetyMismatchError(
            "text encoder: its weights are not in memory (sequential offloading); use enable_model_cpu_offload instead"
        )
    return [(weight[:words] if weight is vocabulary else weight).detach() for weight in weights]


def _hashes(weights: list[Tensor]) -> EncoderHashes:
    through_fp16, direct = hashlib.sha256(), hashlib.sha256()
    for weight in weights:
        half, precise = weight.to("cpu", torch.float16), weight.to("cpu", torch.float32)
        for digest, values in ((through_fp16, half.float()), (direct, precise)):
            rounded = values.bfloat16()
            kept = torch.where(rounded.abs() < SMALLEST, 0, rounded).contiguous()
            digest.update(repr(tuple(kept.shape)).encode())
            digest.update(kept.view(torch.int16).numpy().tobytes())
    return EncoderHashes(through_fp16.hexdigest(), direct.hexdigest())


def _checksum(weight: Tensor) -> int:
    """Of its bits, by row and place of the row, summed where it lies: many times faster than a hash."""
    bits = weight.flatten(1) if weight.ndim > 1 else weight[:, None]
    rows = bits.contiguous().view(BITS[weight.element_size()]).sum(dim=1, dtype=torch.int64)
    return int((rows * torch.arange(1, len(rows) + 1, device=rows.device)).sum())
