"""Safety modules that nothing was taught yet: new ones, and branches for further concepts of one that is finished."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from diffusers import StableDiffusionPipeline
from msgspec import structs
from torch import Tensor

from saferedir.engines.errors import TrainingError
from saferedir_torch.config import NOISE_SHARES, Concept, SafetyConfig
from saferedir_torch.estimate import NoiseLevels
from saferedir_torch.fit import encoder_hashes
from saferedir_torch.learner import STRENGTH
from saferedir_torch.prompt_source import PromptSource
from saferedir_torch.safety_module import SafetyModule, parameters_sha256
from saferedir_torch.trajectories import encode

#: Prompts among which the shortest is looked for.
REFUGE_DRAWS = 500


def new_module(
    pipeline: StableDiffusionPipeline, replacements: Mapping[str, str], *, refuge: Tensor | None = None, **widths: Any
) -> SafetyModule:
    """An untrained safety module that fits `pipeline`, on its device, for concepts and what is drawn in their place.

    `refuge` [N, T, D], such as `refuges` finds, is what it resorts to at last; without it there is no refuge.
    """
    text_encoder = encoder_hashes(pipeline)
    config = SafetyConfig(
        latent_channels=pipeline.unet.config.in_channels,
        prompt_tokens=pipeline.tokenizer.model_max_length,
        prompt_width=pipeline.unet.config.cross_attention_dim,
        concepts=tuple(Concept(name=name, replacement=other, alpha_scale=STRENGTH) for name, other in replacements.items()),
        text_encoder_sha256=text_encoder.through_fp16,
        text_encoder_direct_sha256="" if text_encoder.direct == text_encoder.through_fp16 else text_encoder.direct,
        unet_sha256=parameters_sha256(pipeline.unet),
        noise_shares=NoiseLevels(pipeline.scheduler).shares(NOISE_SHARES),
        refuge=refuge is not None,
        **widths,
    )
    module = SafetyModule(config).to(pipeline.device)
    return with_refuge(module, refuge)


def with_refuge(module: SafetyModule, refuge: Tensor | None) -> SafetyModule:
    """`module`, the concepts of its last branch with `refuge` [N, T, D] where there is one."""
    if refuge is not None:
        module.last_branch.refuge.copy_(refuge)
    return module


def extended_module(base: SafetyModule, replacements: Mapping[str, str], *, refuge: Tensor | None = None) -> SafetyModule:
    """`base` with an untrained branch for further concepts; everything else is copied and frozen.

    The promise on false alarms is dropped: it was for the concepts that were there. `refuge` is the new concepts'.

    Raises:
        TrainingError: `base` knows one of the concepts already, or has a refuge where they have none, or the other way round.
    """
    if base.config.refuge != (refuge is not None):
        raise TrainingError(f"the module has {'a' if base.config.refuge else 'no'} refuge; the added concepts must do alike")
    if twice := [name for name in replacements if name in base.config.concept_names]:
        raise TrainingError(f"the module knows {', '.join(twice)} already; it has {', '.join(base.config.concept_names)}")
    added = tuple(Concept(name=name, replacement=other, alpha_scale=STRENGTH) for name, other in replacements.items())
    config = structs.replace(
        base.config,
        concepts=base.config.concepts + added,
        branches=(*base.config.branch_sizes, len(added)),
        promise=None,
    )
    module = SafetyModule(config).to(next(base.parameters()).device)
    module.load_state_dict(base.state_dict(), strict=False)
    module.requires_grad_(False)
    module.last_branch.requires_grad_(True)
    return with_refuge(module, refuge)


def refuges(pipeline: StableDiffusionPipeline, source: PromptSource, seed: int) -> Tensor:
    """For each concept the embedding of the shortest among many safe prompts that nothing is left of it in, [N, T, D]."""
    shortest = []
    for index, concept in enumerate(source.replacements):
        rng = np.random.default_rng([seed, 24, index])
        drawn = [source.pair(concept, rng) for _ in range(REFUGE_DRAWS)]
        clean = [pair.safe for pair in drawn if set(pair.asked) <= set(pair.replaced)]
        shortest.append(min(clean, key=lambda prompt: (len(prompt), prompt)))
    return encode(pipeline, shortest)[1].to(pipeline.device)


def refuse_unconditional(pipeline: StableDiffusionPipeline) -> None:
    """Raise `TrainingError` where the denoiser has no cross-attention of one width over prompt tokens."""
    width = pipeline.unet.config.get("cross_attention_dim")
    attends = any(name.endswith("attn2") for name, _ in pipeline.unet.named_modules())
    if not isinstance(width, int) or not attends:
        raise TrainingError(
            f"the denoiser {type(pipeline.unet).__name__} has no cross-attention over prompt tokens; "
            "redirection moves what that attention reads, so it cannot protect this model"
        )
