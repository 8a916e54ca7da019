"""Safety modules that nothing was taught yet: new ones, and branches for further concepts of one that is finished."""

from __future__ import annotations

from typing import Any

import numpy as np
from diffusers import StableDiffusionPipeline
from msgspec import structs

from saferedir.engines.errors import TrainingError
from saferedir_torch.config import Concept, SafetyConfig, Stream
from saferedir_torch.fit import encoder_hashes
from saferedir_torch.prompt_source import PromptSource
from saferedir_torch.safety_module import SafetyModule, parameters_sha256
from saferedir_torch.trajectories import encode

#: Prompts among which the shortest is looked for.
FALLBACK_DRAWS = 500


def new_module(pipeline: StableDiffusionPipeline, source: PromptSource, seed: int, **widths: Any) -> SafetyModule:
    """An untrained safety module that fits `pipeline`, on its device, for the concepts of `source`."""
    text_encoder = encoder_hashes(pipeline)
    config = SafetyConfig(
        latent_channels=pipeline.unet.config.in_channels,
        streams=(
            Stream(
                name="prompt", tokens=pipeline.tokenizer.model_max_length, width=pipeline.unet.config.cross_attention_dim
            ),
        ),
        concepts=tuple(Concept(name=name, replacement=other) for name, other in source.replacements.items()),
        text_encoder_sha256=text_encoder.through_fp16,
        text_encoder_direct_sha256="" if text_encoder.direct == text_encoder.through_fp16 else text_encoder.direct,
        unet_sha256=parameters_sha256(pipeline.unet),
        **widths,
    )  # fmt: skip
    module = SafetyModule(config).to(pipeline.device)
    set_fallback(module, pipeline, source, seed)
    return module


def extended_module(base: SafetyModule, pipeline: StableDiffusionPipeline, source: PromptSource, seed: int) -> SafetyModule:
    """`base` with an untrained branch for further concepts; everything else is copied and frozen.

    The promise on false alarms is dropped: it was for the concepts that were there.

    Raises:
        TrainingError: `base` knows one of the concepts already.
    """
    if twice := [name for name in source.replacements if name in base.config.concept_names]:
        raise TrainingError(f"the module knows {', '.join(twice)} already; it has {', '.join(base.config.concept_names)}")
    added = tuple(Concept(name=name, replacement=other) for name, other in source.replacements.items())
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
    set_fallback(module, pipeline, source, seed)
    return module


def set_fallback(module: SafetyModule, pipeline: StableDiffusionPipeline, source: PromptSource, seed: int) -> None:
    """Give each concept of the last branch what it falls back to: the shortest among many safe prompts that nothing is left of
    it in; a concept whose subject is to be kept has none.
    """
    for index, concept in enumerate(source.replacements):
        if concept in source.keeps_subject:
            module.last_branch.keeps_subject[index] = 1
            continue
        rng = np.random.default_rng([seed, 24, index])
        drawn = [source.pair(concept, rng) for _ in range(FALLBACK_DRAWS)]
        clean = [pair.safe for pair in drawn if set(pair.asked) <= set(pair.replaced)]
        safest = min(clean, key=lambda prompt: (len(prompt), prompt))
        module.last_branch.fallback[0][index] = encode(pipeline, [safest])[1][0].to(pipeline.device)


def refuse_unconditional(pipeline: StableDiffusionPipeline) -> None:
    """Raise `TrainingError` where the denoiser has no cross-attention of one width over prompt tokens."""
    width = pipeline.unet.config.get("cross_attention_dim")
    attends = any(name.endswith("attn2") for name, _ in pipeline.unet.named_modules())
    if not isinstance(width, int) or not attends:
        raise TrainingError(
            f"the denoiser {type(pipeline.unet).__name__} has no cross-attention over prompt tokens; "
            "redirection moves what that attention reads, so it cannot protect this model"
        )
