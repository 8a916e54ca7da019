"""The detector's two ways to a logit, and the precision that training computes in."""

from __future__ import annotations

import numpy as np
import torch

from saferedir_torch.detector import Detector
from saferedir_torch.models import SHIPPED_SAFETY, load_pipeline
from saferedir_torch.precision import mixed_precision
from saferedir_torch.safety_module import SAYS_NOTHING, SafetyModule
from saferedir_torch.training_data import make_pairs
from saferedir_torch.trajectories import encode
from saferedir_torch.world.source import WorldPrompts
from saferedir_torch.world.split import load_split

CONCEPTS, TOKENS, WIDTH = 3, 77, 128


def detector() -> Detector:
    torch.manual_seed(0)
    return Detector(SafetyModule.load(SHIPPED_SAFETY).config, CONCEPTS).eval()


@torch.no_grad()
def test_a_logit_is_an_or_of_trunk_and_words() -> None:
    module = detector()
    joint, prompt = torch.randn(4, module.trunk.in_features - 2 * WIDTH), torch.randn(4, TOKENS, WIDTH)
    together, words = module(joint, prompt), module.words(prompt)
    torch.nn.init.constant_(module.words.second.bias, -200.0)
    trunk = module(joint, prompt)
    torch.testing.assert_close(together, torch.logaddexp(trunk, words))
    torch.nn.init.constant_(module.heads.bias, -200.0)
    torch.nn.init.zeros_(module.heads.weight)
    torch.nn.init.constant_(module.words.second.bias, -8.0)
    torch.testing.assert_close(module(joint, prompt), words)


@torch.no_grad()
def test_what_a_word_says_does_not_depend_on_the_others_or_on_its_place() -> None:
    module, telling = detector(), torch.randn(1, 1, WIDTH)
    torch.nn.init.normal_(module.words.second.weight)
    alone = module.words.second(torch.nn.functional.silu(module.words.first(telling)))[0, 0]
    for place in (0, 40, 76):
        prompt = torch.randn(1, TOKENS, WIDTH)
        prompt[:, place] = telling[:, 0]
        assert (module.words(prompt)[0] >= alone - 1e-5).all()
        other = prompt[:, torch.randperm(TOKENS)]
        torch.testing.assert_close(module.words(prompt), module.words(other))


@torch.no_grad()
def test_words_tell_a_concept_without_the_end_of_text_that_sums_them_up() -> None:
    pipeline, module = load_pipeline(), SafetyModule.load(SHIPPED_SAFETY)
    unsafe = ["a hammer to the left of an axe", "an axe and a guitar on a blue background", "a sword, no church"]
    benign = ["a hammer and a guitar", "a cat, no axe on a blue background", "a guitar to the left of a tool for nails"]
    ids, embeds = encode(pipeline, unsafe + benign)
    mixed = embeds.clone()
    mixed[:3, 16:] = embeds[3:, 16:]  # the words of an unsafe prompt before the end of a benign one
    assert (ids[:, 16:] == pipeline.tokenizer.eos_token_id).all()
    weapons = module.config.concept_names.index("weapons")
    logits = module.last_branch.detector.words(mixed)[:, weapons]
    assert (logits[:3] > 0).all()
    assert (logits[3:] < 0).all()


@torch.no_grad()
def test_a_word_that_tells_by_itself_is_moved_and_what_stands_beside_it_stays() -> None:
    pipeline, module = load_pipeline(), SafetyModule.load(SHIPPED_SAFETY)
    _, embeds = encode(pipeline, ["an axe beside a hammer", "a pistol and a guitar", "a hammer and a guitar"])
    torch.manual_seed(0)
    joint = module.encoder(torch.randn(3, 4, 16, 16), torch.full((3,), 961.0))
    weapons = module.config.concept_names.index("weapons")
    active = torch.zeros(3, len(module.config.concepts), dtype=torch.bool)
    active[:, weapons] = True
    never = torch.zeros_like(active)
    mask = module.redirect(embeds, joint, active, torch.full(active.shape, 1.5), never).token_mask[:, weapons]
    assert (mask[:2, 2] > 0.95).all()
    assert (mask[:2, 5] < 0.1).all()  # the hammer and the guitar beside it stay
    assert mask[2].max() < 0.5
    active = active.roll(1, dims=1)  # another concept
    part = module.last_branch.prompt_part(embeds)
    said = module.last_branch.redirection(embeds, part.features, joint, active.float())
    assert module.last_branch.with_word_evidence(said, part.words, active, never).mask[:2, 2].max() < 0.5


@torch.no_grad()
def test_the_mask_is_left_to_its_head_unless_every_active_concept_is_named() -> None:
    pipeline, module = load_pipeline(), SafetyModule.load(SHIPPED_SAFETY)
    _, embeds = encode(pipeline, ["an axe beside a hammer"])
    branch, names = module.last_branch, module.config.concept_names
    joint = module.encoder(torch.zeros(1, 4, 16, 16), torch.full((1,), 961.0))
    active = torch.tensor([[name in ("weapons", "ink") for name in names]])
    part = branch.prompt_part(embeds)
    said = branch.redirection(embeds, part.features, joint, active.float())
    nothing = torch.zeros_like(active)
    corrected = branch.with_word_evidence(said, part.words, active, nothing).mask
    assert (corrected >= said.mask - 1e-4).all()
    assert torch.equal(module.redirect(embeds, joint, nothing, torch.full(nothing.shape, 1.5), nothing).prompt, embeds)


@torch.no_grad()
def test_pieces_of_a_name_that_is_spelt_strangely_are_moved_with_it() -> None:
    pipeline, module = load_pipeline(), SafetyModule.load(SHIPPED_SAFETY)
    prompt = "a bow with a qwiver beside a fish"
    assert pipeline.tokenizer.tokenize(prompt)[4:7] == ["q", "wi", "ver</w>"]
    _, embeds = encode(pipeline, [prompt])
    joint = module.encoder(torch.zeros(1, 4, 16, 16), torch.full((1,), 961.0))
    active = torch.tensor([[name == "weapons" for name in module.config.concept_names]])
    mask = module.redirect(embeds, joint, active, torch.full(active.shape, 1.5), torch.zeros_like(active)).token_mask[active][0]
    says = module.last_branch.prompt_part(embeds).words[0, :, active[0]][:, 0]
    assert says[6] < 2 * SAYS_NOTHING  # "wi" by itself
    assert mask[5:8].min() > 0.5
    assert mask[10] < 0.1  # the fish


@torch.no_grad()
def test_nothing_is_spared_where_a_concept_fires_though_it_is_active() -> None:
    pipeline, module = load_pipeline(), SafetyModule.load(SHIPPED_SAFETY)
    _, embeds = encode(pipeline, ["an axe and a swrod beside a fish"] * 2)
    branch = module.last_branch
    joint = module.encoder(torch.zeros(2, 4, 16, 16), torch.full((2,), 961.0))
    active = torch.tensor([[name == "weapons" for name in module.config.concept_names]] * 2)
    again = active & torch.tensor([[False], [True]])
    part = branch.prompt_part(embeds)
    said = branch.redirection(embeds, part.features, joint, active.float())
    first, second = branch.with_word_evidence(said, part.words, active, again).mask
    assert (second >= said.mask[1] - 1e-6).all()
    assert second[5] > 0.2 > first[5]  # the first letter of the sword


def test_pairs_mark_the_words_before_the_end_of_text() -> None:
    pipeline = load_pipeline()
    pairs = make_pairs(pipeline, WorldPrompts(["church"], load_split()), count=4, seed=0)
    first = WorldPrompts(["church"], load_split()).varied_pair("church", np.random.default_rng([0, 21, 0])).unsafe
    assert pairs.words.shape == (len(pairs.asked), TOKENS)
    assert int(pairs.words[0].sum()) == len(pipeline.tokenizer(first).input_ids) - 1
    assert (pairs.words.int().diff(dim=1) <= 0).all()


def test_training_in_half_precision_reaches_every_parameter_as_in_full() -> None:
    """Attention written out keeps its gradient under autocast, which torch's fused one loses on some CPUs."""
    module = SafetyModule.load(SHIPPED_SAFETY).train()
    latent, prompt = torch.randn(8, 4, 16, 16), torch.randn(8, TOKENS, WIDTH)
    gradients = []
    for halved in (False, True):
        module.zero_grad()
        with mixed_precision(torch.device("cpu")) if halved else torch.autocast("cpu", enabled=False):
            joint = module.encoder(latent, torch.linspace(0, 999, 8))
            branch = module.last_branch
            active = torch.ones(8, len(branch.gains))
            part = branch.prompt_part(prompt)
            said = branch.redirection(prompt, part.features, joint, active)
            loss = branch.logits(joint, prompt).float().square().mean() + (said.target - prompt).square().mean()
            loss = loss + said.alpha.float().mean() + said.mask_logits.float().mean()
            assert branch.alone is not None
            loss = loss + branch.alone(joint, latent.flip(0)).float().square().mean()
        loss.backward()  # type: ignore[no-untyped-call]
        gradients.append({name: parameter.grad.clone() for name, parameter in module.named_parameters()})
    for name, full in gradients[0].items():
        half = gradients[1][name]
        assert torch.cosine_similarity(full.flatten(), half.flatten(), dim=0) > 0.9, name
