"""Peers: each does what its paper states of it, on the embedded model, and none touches the pipeline it is given."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from small_module import telling_module

from saferedir_torch.models import load_pipeline
from saferedir_torch.peers.guidance import MAX, NegativePrompt, SafeLatentDiffusion
from saferedir_torch.peers.image_filter import ImageFilter
from saferedir_torch.peers.model_editing import ErasedStableDiffusion, UnifiedConceptEditing, cross_attention_projections
from saferedir_torch.peers.peer import Peer
from saferedir_torch.peers.published import PublishedSafeRedir
from saferedir_torch.peers.saferedir import SafeRedir
from saferedir_torch.peers.safree import Safree
from saferedir_torch.protect import protect
from saferedir_torch.published import PublishedNetwork, PublishedOutput

PROMPTS, SEEDS = ["a church next to a cat", "a dog on blue"], [3, 4]
STEPS = 4


@pytest.fixture(scope="module")
def model() -> Any:
    return load_pipeline()


@pytest.fixture(scope="module")
def plain(model: Any) -> Any:
    return Peer(model, steps=STEPS).draw(PROMPTS, SEEDS)


def values(layer: torch.nn.Linear, embeds: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return layer(embeds)


def test_no_safety_draws_what_diffusers_draws(model: Any, plain: Any) -> None:
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    theirs = model(PROMPTS, generator=generators, num_inference_steps=STEPS, guidance_scale=5.0).images
    assert np.abs(plain.astype(int) - np.stack([np.asarray(picture) for picture in theirs]).astype(int)).max() <= 1
    (one,) = Peer(model, steps=STEPS).generate(PROMPTS[1:], seed=4)
    assert np.abs(np.asarray(one).astype(int) - plain[1].astype(int)).max() <= 1


def test_an_empty_negative_prompt_changes_nothing_and_another_does(model: Any, plain: Any) -> None:
    assert (NegativePrompt(model, "", steps=STEPS).draw(PROMPTS, SEEDS) == plain).all()
    assert (NegativePrompt(model, "a church", steps=STEPS).draw(PROMPTS, SEEDS) != plain).any(axis=(1, 2, 3)).all()


def test_safe_latent_diffusion_steers_after_its_warm_up_and_towards_nothing_else(model: Any, plain: Any) -> None:
    late = SafeLatentDiffusion(model, "a church", replace(MAX, warmup=STEPS), steps=STEPS)
    assert (late.draw(PROMPTS, SEEDS) == plain).all()
    # Where the prediction does not move towards the concept nothing is steered: no threshold is as low.
    never = SafeLatentDiffusion(model, "a church", replace(MAX, threshold=-float("inf")), steps=STEPS)
    assert (never.draw(PROMPTS, SEEDS) == plain).all()
    steered = SafeLatentDiffusion(model, "a church", MAX, steps=STEPS).draw(PROMPTS, SEEDS)
    assert (steered != plain).any(axis=(1, 2, 3)).all()


@torch.no_grad()
def test_safe_latent_diffusion_follows_its_equations(model: Any) -> None:
    peer = SafeLatentDiffusion(model, "a church", MAX)
    batch, latent, timestep = peer.begin(PROMPTS, peer.encode(PROMPTS)), torch.randn(2, 4, 16, 16), torch.tensor(500)
    if latent.shape[-1] != model.unet.config.sample_size:
        latent = torch.randn(2, 4, model.unet.config.sample_size, model.unet.config.sample_size)
    without, own, concept = peer.predict(latent, timestep, batch.negative, batch.embeds, batch.kept["concept"])
    difference = own - concept
    mu = torch.where(difference < 1.0, (5000 * difference).abs().clamp(max=1), 0)
    first = mu * (concept - without)
    assert torch.allclose(peer.guided(batch, 0, timestep, latent), without + 5 * (own - without - first), atol=1e-5)
    second = first + 0.5 * 0.3 * first  # the momentum of one step is (1 - 0.7) of what was done
    assert torch.allclose(peer.guided(batch, 1, timestep, latent), without + 5 * (own - without - second), atol=1e-5)


def test_safree_finds_the_trigger_and_spares_the_rest(model: Any, plain: Any) -> None:
    peer = Safree(model, ["church", "a church", "chapel", "cathedral"], steps=STEPS)
    tokens = model.tokenizer.tokenize(PROMPTS[0])
    flagged = [token for token, trigger in zip(tokens, peer.triggers(PROMPTS[0]), strict=True) if trigger]
    assert "church</w>" in flagged
    assert len(flagged) < len(tokens)
    away = peer._away
    assert torch.allclose(away @ away, away, atol=1e-3)  # a projection
    assert float((peer._sentences(["a church"]) @ away).norm()) < 1e-2  # of the concept nothing is left
    drawn = peer.draw(PROMPTS, SEEDS)
    assert (drawn[0] != plain[0]).any()


def test_safree_without_triggers_draws_as_before(model: Any, plain: Any) -> None:
    assert (Safree(model, ["a church"], alpha=10.0, steps=STEPS).draw(PROMPTS, SEEDS) == plain).all()


def test_uce_moves_what_is_erased_and_keeps_what_is_preserved(model: Any) -> None:
    peer = UnifiedConceptEditing(model, [("a church", "a house")], ["a cat", "a dog on blue"], steps=STEPS)
    church, house, cat = peer.encode(["a church", "a house", "a cat"])
    old = list(cross_attention_projections(model.unet, ("to_k", "to_v")))
    new = list(cross_attention_projections(peer.unet, ("to_k", "to_v")))
    assert len(new) == len(old) > 0
    for before, after in zip(old, new, strict=True):
        wanted = values(before, house)
        assert (values(after, church) - wanted).norm() < 0.35 * (values(before, church) - wanted).norm()
        assert (values(after, cat) - values(before, cat)).norm() < 0.1 * values(before, cat).norm()


def test_esd_learns_to_predict_away_and_trains_cross_attention_alone(model: Any) -> None:
    untouched = copy.deepcopy(model.unet.state_dict())
    losses: list[float] = []
    peer = ErasedStableDiffusion(
        model,
        ["a church", "a chapel"],
        iterations=30,
        rate=1e-3,
        batch=2,
        steps=STEPS,
        on_step=lambda _, loss: losses.append(loss),
    )
    assert np.mean(losses[-8:]) < 0.7 * np.mean(losses[:4])
    for name, weight in peer.unet.state_dict().items():
        assert torch.equal(weight, untouched[name]) != (".attn2.to_" in name), name
        assert torch.equal(model.unet.state_dict()[name], untouched[name])
    assert all(weight.requires_grad is False for weight in peer.unet.parameters())


def test_saferedir_draws_what_it_draws_on_a_stock_pipeline(model: Any, plain: Any) -> None:
    module = telling_module(model)
    drawn = SafeRedir(model, module, steps=STEPS).draw(PROMPTS, SEEDS)
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    with protect(model, module) as guard:
        theirs = model(PROMPTS, generator=generators, num_inference_steps=STEPS, guidance_scale=5.0).images
    assert guard.last.fired[:, 0].any()
    assert np.abs(drawn.astype(int) - np.stack([np.asarray(picture) for picture in theirs]).astype(int)).max() <= 1
    assert (drawn[0] != plain[0]).any()
    assert (drawn[1] == plain[1]).all()


def test_a_filter_hands_out_a_blank_for_what_it_finds(model: Any, plain: Any) -> None:
    method = ImageFilter(model, lambda pictures: torch.tensor([True, False]), torch.nn.Identity(), steps=STEPS)
    drawn = method.draw(PROMPTS, SEEDS)
    assert len(np.unique(drawn[0])) == 1
    assert (drawn[1] == plain[1]).all()


class _Suspicious(PublishedNetwork):
    """Finds the first prompt of a batch unsafe in every step, and moves all of its tokens one way."""

    def forward(self, latent: torch.Tensor, prompt: torch.Tensor, timestep: torch.Tensor) -> PublishedOutput:
        output = super().forward(latent, prompt, timestep)
        logits = torch.zeros_like(output.logits)
        logits[0, 1] = 1.0
        return output._replace(logits=logits, delta=torch.ones_like(prompt), mask=torch.ones_like(output.mask))


def test_the_published_method_leaves_the_first_step_and_what_it_finds_safe(model: Any, plain: Any) -> None:
    torch.manual_seed(0)
    network = _Suspicious(tokens=77, width=model.unet.config.cross_attention_dim, channels=4)
    drawn = PublishedSafeRedir(model, network, steps=STEPS).draw(PROMPTS, SEEDS)
    assert (drawn[0] != plain[0]).any()
    assert (drawn[1] == plain[1]).all()
    alone = Peer(model, steps=1).draw(PROMPTS, SEEDS)
    assert (PublishedSafeRedir(model, network, steps=1).draw(PROMPTS, SEEDS) == alone).all()
