"""A safety module of a few thousand parameters, untrained, and what its controller is given."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.small_pipeline import SMALL
from saferedir_torch.config import Concept, SafetyConfig, Stream
from saferedir_torch.controller import Guided, Policy, Seen
from saferedir_torch.detector import Step
from saferedir_torch.eager_policy import NEVER
from saferedir_torch.new_module import new_module
from saferedir_torch.safety_module import SafetyModule
from saferedir_torch.trajectories import encode
from saferedir_torch.world.source import WorldPrompts
from saferedir_torch.world.split import load_split

TOKENS, WIDTH, CONCEPTS = 9, 16, 3


def small_config(**wishes: Any) -> SafetyConfig:
    """Of concepts a, b and c; `wishes` go before everything else."""
    usual = {
        "latent_channels": 4, "streams": (Stream(name="prompt", tokens=TOKENS, width=WIDTH),),
        "concepts": tuple(Concept(name=name, replacement="x") for name in "abc"), **SMALL,
    }  # fmt: skip
    return SafetyConfig(**(usual | wishes))


def small_module(**wishes: Any) -> SafetyModule:
    """The same weights each time, lively; `wishes` are for its configuration."""
    torch.manual_seed(0)
    return lively(SafetyModule(small_config(**wishes)).eval())


def fitting_module(pipeline: Any, *concepts: str) -> SafetyModule:
    """A small module that fits the embedded model, lively, of concepts of its world; church, ink and weapons by default."""
    torch.manual_seed(0)
    source = WorldPrompts(concepts or ("church", "ink", "weapons"), load_split())
    return lively(new_module(pipeline, source, 0, **SMALL).eval())


#: Prompts that a telling module is made by.
CHURCHES = ("a church", "a church next to a cat", "a church beside a fox", "a church on blue", "a dog next to a church")
OTHERS = ("", "a cat", "a dog on blue", "a house next to a cat", "a house", "a fox beside a dog", "a cat in ink style")


@torch.no_grad()
def telling_module(pipeline: Any) -> SafetyModule:
    """One that fits the embedded model, of church, ink and weapons, and fires where a prompt names a church, at any noise.

    Its words are told by least squares: of churches from all tokens of prompts without one.
    """
    torch.manual_seed(0)
    source = WorldPrompts(("church", "ink", "weapons"), load_split())
    module = lively(new_module(pipeline, source, 0, **(SMALL | {"features": 96})).eval())
    branch, detector = module.last_branch, module.last_branch.detector
    ids, named = encode(pipeline, list(CHURCHES))
    church = pipeline.tokenizer("church").input_ids[1]
    churches = branch.conditioning([named])[ids == church]
    others = branch.conditioning([encode(pipeline, list(OTHERS))[1]]).flatten(0, 1)
    tokens = torch.cat([churches.repeat(len(others) // len(churches), 1), others])
    wanted = torch.cat([torch.full((len(tokens) - len(others), 1), 8.0), torch.full((len(others), 1), -16.0)])
    probe = torch.linalg.lstsq(torch.cat([tokens, torch.ones(len(tokens), 1)], dim=1), wanted).solution[:, 0]
    branch.centre.zero_()
    detector.head.weight.zero_()
    detector.head.bias.fill_(-12.0)
    detector.words.weight.zero_()
    detector.words.bias.fill_(-16.0)
    detector.words.weight[0], detector.words.bias[0] = probe[:-1], probe[-1]
    return module


@torch.no_grad()
def lively(module: SafetyModule) -> SafetyModule:
    """`module` with scores of noise on both sides of 0.5, which differ from step to step, and a fallback for every concept;
    rounded as on disk."""
    for weight in module.parameters():
        weight.mul_(2 if weight.ndim > 1 else 1)
    for branch in module.each_branch():
        branch.detector.nothing.normal_()
        for fallback in branch.fallback:
            fallback.normal_()
    streams = [torch.randn(64, stream.tokens, stream.width) for stream in module.config.streams]
    features = module.features(Step(*torch.randn(2, 64, module.config.latent_channels, 16, 16), torch.rand(64)))
    usual = module.score(features, torch.ones(64, dtype=torch.bool), streams, streams, streams).statistic.median(dim=0).values
    for branch, own in zip(module.each_branch(), usual.split(list(module.config.branch_sizes)), strict=True):
        branch.centre[0] = own.repeat(2)
    for value in module.state_dict().values():
        value.copy_(value.half())
    return module


def seen_at(latent: Tensor, share: float = 0.6, denoised: Tensor | None = None) -> Seen:
    """What is seen of requests with latents [B, C, h, w]; without `denoised` in their first step."""
    known = torch.full((len(latent),), denoised is not None)
    return Seen(latent, torch.full((len(latent),), share), torch.zeros_like(latent) if denoised is None else denoised, known)


def unguided(prompt: Tensor) -> Guided:
    """No more guidance than usual."""
    return Guided(torch.zeros_like(prompt), torch.zeros(len(prompt)))


def firing(fires: Tensor, *, period: int = 0) -> Policy:
    """Under which the concepts `fires` [B, N] bool fire whatever the score, and no others."""
    threshold = torch.where(fires, 0.0, NEVER)
    return Policy(torch.full((len(fires),), period, dtype=torch.int32), threshold)


def as_usual_module() -> SafetyModule:
    """As wide as a module is where nothing else is said, and conditioned as the embedded model is."""
    streams = (Stream(name="prompt", tokens=77, width=128),)
    return small_module(streams=streams, convolutions=(40, 80, 128), features=128, heads=4)
