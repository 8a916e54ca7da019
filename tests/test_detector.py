"""The network's parts: what each answer reads, how far tokens are moved, what it weighs, and how it is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_module import CONCEPTS, TOKENS, WIDTH, small_config, small_module
from torch import Tensor

from saferedir.engines.errors import RequestError
from saferedir_torch.calibration import piecewise_linear
from saferedir_torch.config import SafetyConfig, Stream
from saferedir_torch.detector import KNOTS, Convolution, Step, StepEncoder, add_norms, bends, fold_norms
from saferedir_torch.losses import redirection_loss
from saferedir_torch.models import load_pipeline
from saferedir_torch.pairs import make_pairs
from saferedir_torch.precision import mixed_precision
from saferedir_torch.redirector import REACH, Redirection, redirect
from saferedir_torch.safety_module import Branch, SafetyModule
from saferedir_torch.world.source import WorldPrompts
from saferedir_torch.world.split import load_split

BATCH = 5


def step(batch: int = BATCH, seed: int = 0) -> Step:
    generator = torch.Generator().manual_seed(seed)
    pictures = torch.randn(2, batch, 4, 16, 16, generator=generator)
    return Step(*pictures, torch.rand(batch, generator=generator))


def encoded(encoder: StepEncoder, of: Step) -> Tensor:
    joint: Tensor = encoder(of, bends(of.share))
    return joint


def prompts(seed: int, batch: int = BATCH) -> Tensor:
    return torch.randn(batch, TOKENS, WIDTH, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def test_norms_folded_into_convolutions_change_nothing() -> None:
    torch.manual_seed(0)
    encoder = StepEncoder(small_config())
    names = set(encoder.state_dict())
    add_norms(encoder)
    for seed in range(20):
        encoded(encoder.train(), step(16, seed))
    for part in encoder.modules():
        if isinstance(part, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(part.weight, 1, 0.3)
            torch.nn.init.normal_(part.bias)
    expected = encoded(encoder.eval(), step())
    fold_norms(encoder)
    assert set(encoder.state_dict()) == names  # as a module on disk has them
    assert sum(isinstance(part, Convolution) for part in encoder.modules()) == 7
    torch.testing.assert_close(encoded(encoder, step()), expected, rtol=1e-4, atol=1e-5)
    assert (expected.std(dim=0) > 0).any()


@torch.no_grad()
def test_what_a_step_shows_alone_no_prompt_changes() -> None:
    module = small_module()
    features, branch = module.features(step()), module.last_branch
    reads = (branch.read(features.joint[:BATCH], [prompts(seed)]) for seed in range(9))
    first, *others = (branch.answers(features, read.context, read.tokens) for read in reads)
    assert all(torch.equal(first.shown, other.shown) for other in others)
    assert not any(torch.equal(first.told, other.told) for other in others)


@torch.no_grad()
def test_words_are_read_as_they_are_and_all_else_as_it_is_drawn() -> None:
    module = small_module()
    features, known, branch = module.features(step()), torch.ones(BATCH, dtype=torch.bool), module.last_branch
    drawn, in_force, other = ([prompts(seed)] for seed in (11, 12, 13))
    scored = module.score(features, known, drawn, in_force, other).statistic
    branch.detector.words.bias.fill_(-200.0)
    head = module.score(features, known, drawn, in_force, other).statistic
    assert torch.equal(head, module.score(features, known, drawn, other, in_force).statistic)
    assert not torch.equal(head, module.score(features, known, in_force, drawn, other).statistic)
    assert not torch.equal(head, scored)


@torch.no_grad()
def test_the_answer_with_the_prompt_is_an_or_of_the_head_and_of_words() -> None:
    module = small_module()
    branch, features = module.last_branch, module.features(step())
    branch.centre.zero_()
    branch.detector.words.bias.zero_()
    read = branch.read(features.joint[:BATCH], [prompts(1)])
    together = branch.answers(features, read.context, read.tokens)
    branch.detector.words.bias.fill_(-200.0)
    head = branch.answers(features, read.context, read.tokens).told
    torch.testing.assert_close(together.told, torch.logaddexp(head, together.words))
    branch.detector.words.bias.zero_()
    branch.detector.head.weight.zero_()
    branch.detector.head.bias.fill_(-200.0)
    torch.testing.assert_close(branch.answers(features, read.context, read.tokens).told, together.words)


@torch.no_grad()
def test_what_a_word_says_does_not_depend_on_the_others_or_on_its_place() -> None:
    module = small_module()
    branch, features, telling = module.last_branch, module.features(step(1)), 3 * prompts(2, 1)[:, 0]

    def words(prompt: Tensor) -> Tensor:
        read = branch.read(features.joint[:1], [prompt])
        return branch.answers(features, read.context, read.tokens).words

    alone = branch.detector.words(branch.conditioning([telling[:, None]]))[:, 0]
    for place in (0, 4, TOKENS - 1):
        prompt = prompts(3 + place, 1)
        prompt[:, place] = telling
        assert (words(prompt) >= alone).all()
        torch.testing.assert_close(words(prompt), words(prompt[:, torch.randperm(TOKENS)]))


@settings(deadline=None, max_examples=30)
@given(values=st.lists(st.floats(-20, 20), min_size=KNOTS + 1, max_size=KNOTS + 1), between=st.floats(0, 1))
def test_a_table_of_levels_is_met_at_its_knots_and_linear_between_them(values: list[float], between: float) -> None:
    levels = torch.tensor(values).double()[:, None]
    branch = Branch(small_config(), 1).double()
    branch.centre.copy_(piecewise_linear(levels.expand(-1, 2)))
    knots = torch.arange(KNOTS + 1).double() / KNOTS
    torch.testing.assert_close(branch.levels(bends(knots)), levels.expand(-1, 2))
    inner = branch.levels(bends((torch.arange(KNOTS).double() + between) / KNOTS))
    torch.testing.assert_close(inner[:, :1], torch.lerp(levels[:-1], levels[1:], between))


@torch.no_grad()
def test_each_answer_is_relative_to_its_own_level() -> None:
    module = small_module()
    branch, where = module.last_branch, step()
    features = module.features(where)
    read = branch.read(features.joint[:BATCH], [prompts(4)])
    branch.centre.zero_()
    raw = branch.answers(features, read.context, read.tokens)
    branch.centre[0] = torch.arange(2.0 * CONCEPTS)
    branch.centre[1] = 10  # a slope from the first knot on
    centred = branch.answers(features, read.context, read.tokens)
    levels = torch.arange(2.0 * CONCEPTS) + 10 * where.share[:, None]
    torch.testing.assert_close(raw.told - centred.told, levels[:, :CONCEPTS], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(raw.shown - centred.shown, levels[:, CONCEPTS:], rtol=1e-4, atol=1e-4)
    assert torch.equal(raw.words, centred.words)


def test_a_token_is_moved_by_so_many_of_its_own_lengths() -> None:
    original, direction = prompts(5), prompts(6)
    length, mask = torch.rand(BATCH, TOKENS), torch.rand(BATCH, TOKENS)
    mask[:, 3], length[:, 4], direction[:, 5] = 0, 0, 0
    original[3, 6], entirely = 0, torch.zeros(BATCH, 1, dtype=torch.bool)
    entirely[3] = True
    (moved,) = redirect([original], Redirection([direction], length, mask, mask), entirely)
    rest = torch.arange(BATCH) != 3
    assert torch.equal(moved[rest, 3:6], original[rest, 3:6])
    assert torch.equal(moved[3], torch.where(original[3] != 0, original[3] + direction[3], 0.0))  # padding stays
    for row, token in ((0, 0), (2, 7), (4, 8)):
        own, way = original[row, token], direction[row, token]
        by_hand = own + REACH * mask[row, token] * length[row, token] * own.norm() * way / way.norm()
        torch.testing.assert_close(moved[row, token], by_hand)


#: As in Stable Diffusion XL: tokens, and a pooled vector.
TWO = (Stream(name="tokens", tokens=7, width=24), Stream(name="pooled", tokens=1, width=12))


@torch.no_grad()
def test_streams_of_any_widths_are_scored_and_moved_by_one_verdict() -> None:
    module = small_module(streams=TWO)
    original = [torch.randn(3, stream.tokens, stream.width) for stream in TWO]
    scored = module.score(module.features(step(3)), torch.ones(3, dtype=torch.bool), original, original, original)
    assert scored.statistic.shape == (3, CONCEPTS)
    for index in range(len(TWO)):  # every stream is read
        other = [torch.randn_like(stream) if own == index else stream for own, stream in enumerate(original)]
        found = module.score(scored.step, torch.ones(3, dtype=torch.bool), other, other, original).statistic
        assert not torch.equal(found, scored.statistic)
    active = torch.tensor([[True, False, False], [False, False, False], [False, True, True]])
    again = torch.tensor([[False] * 3, [False] * 3, [False, True, False]])
    moved = module.redirect(scored, original, active, again)
    assert [stream.shape for stream in moved.streams] == [stream.shape for stream in original]
    assert moved.token_mask.shape == (3, CONCEPTS, 8)
    found = module.last_branch.redirection(scored.step, scored.read[0], active.float())
    expected = redirect(original, found, again.any(dim=1, keepdim=True))
    start = 0
    for stream, by_formula, own, safe in zip(moved.streams, expected, original, module.last_branch.fallback, strict=True):
        assert torch.equal(stream[0], by_formula[0])
        assert not torch.equal(stream[0], own[0])
        assert torch.equal(stream[2], safe[1])
        count = own.shape[1]
        mask, length = (part[0, start : start + count] for part in (found.mask, found.length))
        distance = (stream[0] - own[0]).norm(dim=-1)
        torch.testing.assert_close(distance, REACH * mask * length * own[0].norm(dim=-1))
        start += count


@pytest.mark.parametrize(
    ("tokens", "width", "pooled", "features", "most"),
    [(77, 2048, 1280, 128, 8e6), (512, 4096, 768, 128, 8e6), (512, 15360, None, 256, 20e6)],
)
def test_the_network_does_not_grow_with_the_square_of_the_conditionings_width(
    tokens: int, width: int, pooled: int | None, features: int, most: float
) -> None:
    """Of SDXL, of FLUX.1, and of a model whose prompts are read by three layers of a language model."""
    streams = [Stream(name="tokens", tokens=tokens, width=width)]
    if pooled is not None:
        streams.append(Stream(name="pooled", tokens=1, width=pooled))
    with torch.device("meta"):
        usual = SafetyModule(small_config(streams=tuple(streams), convolutions=(40, 80, 128), features=features, heads=4))
    parameters = sum(parameter.numel() for parameter in usual.parameters())
    assert 1e6 < parameters <= most


@pytest.mark.parametrize(
    ("wishes", "said"),
    [
        ({"heads": 3}, "heads is 3, which does not divide the 16 features"),
        ({"streams": TWO[:1] * 2}, "streams occur twice: tokens"),
        ({"branches": (1, 1)}, r"branches \(1, 1\) do not add up to 3 concepts"),
    ],
)
def test_a_configuration_that_contradicts_itself_is_refused(wishes: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=said):
        small_config(**wishes)
    raw = msgspec.to_builtins(small_config()) | {name: msgspec.to_builtins(value) for name, value in wishes.items()}
    (tmp_path / "config.json").write_bytes(msgspec.json.encode(raw))
    with pytest.raises(RequestError, match=rf"config\.json.*{said}"):
        SafetyConfig.load(tmp_path / "config.json")


def test_pairs_mark_the_words_before_the_end_of_text() -> None:
    pipeline = load_pipeline()
    pairs = make_pairs(pipeline, WorldPrompts(["church"], load_split()), count=4, seed=0)
    first = WorldPrompts(["church"], load_split()).varied_pair("church", np.random.default_rng([0, 21, 0])).unsafe
    assert pairs.words.shape == (len(pairs.asked), 77)
    assert int(pairs.words[0].sum()) == len(pipeline.tokenizer(first).input_ids) - 1
    assert (pairs.words.int().diff(dim=1) <= 0).all()


def test_training_in_half_precision_reaches_every_parameter_as_in_full() -> None:
    """Attention written out keeps its gradient under autocast, which torch's fused one loses on some CPUs."""
    module = small_module(features=32, convolutions=(32, 32, 64)).train()
    branch, prompt, target = module.last_branch, prompts(7, 16), prompts(8, 16)
    gradients = []
    for halved in (False, True):
        module.zero_grad()
        with mixed_precision(torch.device("cpu")) if halved else torch.autocast("cpu", enabled=False):
            features = module.features(step(16))
            read = branch.read(features.joint[:16], [prompt])
            answers = branch.answers(features, read.context, read.tokens)
            found = branch.redirector(features.joint[:16], read.context, torch.ones(16, CONCEPTS), read.tokens)
            loss, _ = redirection_loss(found, prompt, target, torch.ones(16, TOKENS))
            loss = loss + sum(answer.float().square().mean() for answer in answers)
        loss.backward()
        gradients.append({name: parameter.grad for name, parameter in module.named_parameters()})
    full, half = gradients
    for name, expected in full.items():
        found_half = half[name]
        assert expected is not None and found_half is not None, name
        assert expected.abs().max() > 0, name
        assert torch.cosine_similarity(expected.flatten(), found_half.flatten(), dim=0) > 0.9, name
