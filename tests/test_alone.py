"""What latents show without the prompt: scores that no word can lower, taught and levelled on their own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec import structs
from small_module import TOKENS, WIDTH, small_module, unknown

from saferedir.engines.errors import TrainingError
from saferedir_torch.calibration import RATE, highest_logits, set_levels, tail_level
from saferedir_torch.comparable import make_comparable_alone
from saferedir_torch.controller import Controller, Policy, State
from saferedir_torch.estimate import shown_estimate
from saferedir_torch.learner import Learner
from saferedir_torch.models import SHIPPED_SAFETY, load_pipeline
from saferedir_torch.new_module import extended_module
from saferedir_torch.recording import RecordedRuns
from saferedir_torch.safety_module import KNOTS, SafetyModule, near_knots
from saferedir_torch.train import teach_alone, train
from saferedir_torch.training_data import LatentBank, PairBank
from saferedir_torch.trajectories import encode, initial_noise, sample
from saferedir_torch.world.source import WorldPrompts
from saferedir_torch.world.split import load_split

BATCH = 5

pytestmark = pytest.mark.usefixtures("small_training")


@torch.no_grad()
def test_no_prompt_lowers_what_a_latent_shows() -> None:
    module = small_module(alone=True)
    latent, timestep = torch.randn(BATCH, 4, 16, 16), torch.tensor([999.0, 700, 500, 123, 0])
    branch = module.last_branch
    assert branch.alone is not None
    branch.alone_levels.copy_(torch.randn(3, KNOTS))
    branch.alone_gains.copy_(torch.tensor([0.5, 1.0, 2.0]))
    branch.levels.fill_(-1.0)
    expected = torch.randn(BATCH, 4, 16, 16)
    joint, logits = module.features(latent, timestep, expected)
    assert logits is not None
    assert torch.equal(logits, branch.alone(joint, expected))
    shown = (logits - near_knots(timestep) @ branch.alone_levels.T) * branch.alone_gains
    raised = 0
    for seed in range(20):
        prompt = 3 * torch.randn(BATCH, TOKENS, WIDTH, generator=torch.Generator().manual_seed(seed))
        together = branch.comparable(branch.logits(joint, prompt), timestep)
        score = module.score(latent, timestep, prompt, expected).score
        assert (score >= torch.sigmoid(shown)).all()
        assert torch.equal(score, torch.sigmoid(torch.maximum(shown, together)))
        raised += int((shown > together).sum())
    assert 0 < raised < 20 * BATCH * 3


@torch.no_grad()
def test_what_shows_though_nothing_known_asks_for_it_is_led_to_the_refuge_at_once() -> None:
    module = small_module(alone=True, refuge=True)
    branch = module.last_branch
    assert branch.alone is not None
    branch.refuge.copy_(torch.randn(3, TOKENS, WIDTH, generator=torch.Generator().manual_seed(5)))
    latent, timestep, prompt = torch.randn(3, 4, 16, 16), torch.full((3,), 300.0), torch.randn(3, TOKENS, WIDTH)
    joint, shown = module.features(latent, timestep)
    assert shown is not None
    together = branch.logits(joint, prompt)

    def step(*, together_at: float, shown_at: float) -> torch.Tensor:
        """The prompt after a step in which the second concept has the given logits, and the others none to speak of."""
        for levels, logits, wanted in (
            (branch.levels, together.amax(dim=0), together_at), (branch.alone_levels, shown.amax(dim=0), shown_at),
        ):  # fmt: skip
            levels.copy_((logits + 9)[:, None].expand(3, KNOTS))
            levels[1] = logits[1] - wanted
        policy = Policy(
            period=torch.ones(3, dtype=torch.int32), enabled=torch.ones(3, 3, dtype=torch.bool),
            threshold=torch.full((3, 3), 0.5), alpha_scale=torch.full((3, 3), 1.5),
        )  # fmt: skip
        state, verdict = Controller(module)(latent, timestep, prompt, State.initial(prompt, 3), policy, *unknown(latent))
        row = int(together[:, 1].argmax()) if together_at > shown_at else int(shown[:, 1].argmax())
        assert verdict.fired[row].tolist() == [False, True, False]
        return state.prompt[row]

    assert torch.equal(step(together_at=-3, shown_at=1), branch.refuge[1])
    moved = step(together_at=2, shown_at=1)
    assert not torch.equal(moved, branch.refuge[1])


def test_a_configuration_from_before_has_none(tmp_path: Path) -> None:
    module = small_module()
    module.save(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    del raw["alone"]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    loaded = SafetyModule.load(tmp_path)
    assert loaded.last_branch.alone is None
    assert loaded.state_dict().keys() == module.state_dict().keys()


def test_added_concepts_are_not_looked_for_in_latents_alone() -> None:
    """The encoder was taught without them."""
    extended = extended_module(small_module(alone=True), {"d": "y"})
    first, added = extended.each_branch()
    assert first.alone is not None
    assert added.alone is None


def bank_of(runs: int, steps: int) -> LatentBank:
    """Runs of one concept that shows as stripes from the third step on, in every other run."""
    unsafe = (torch.arange(runs) % 2 == 1).repeat_interleave(steps)
    timestep = torch.linspace(999, 0, steps).repeat(runs)
    clear = timestep < 700
    latent = 0.3 * torch.randn(runs * steps, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    latent[unsafe & clear] += 2 * (torch.arange(16) % 4 < 2).float()
    shown = torch.where(unsafe, torch.where(clear, 1.0, -1.0), 0.0)[:, None]
    run = torch.arange(runs).repeat_interleave(steps)
    prompts = torch.zeros(runs, TOKENS, WIDTH)
    return LatentBank(("a",), latent.half(), latent.half(), timestep, run, prompts, unsafe.float()[:, None], shown, run)


def test_it_learns_what_shows_and_is_levelled_by_what_is_clean(tmp_path: Path) -> None:
    config = small_module(alone=True).config
    module = SafetyModule(structs.replace(config, concepts=config.concepts[:1])).eval()
    bank, empty = bank_of(80, 8), torch.zeros(20, TOKENS, WIDTH)
    pairs = PairBank(empty, empty, torch.zeros(20, 1), torch.zeros(20, 1), torch.ones(empty.shape[:2], dtype=torch.bool))
    learner = Learner(module, bank, pairs, torch.linspace(0.999, 0.01, 1000), 0)
    others = {name: value.clone() for name, value in module.state_dict().items() if ".alone" not in name}
    before = learner.validate()["alone"]
    teach_alone(module, learner, tmp_path, steps=300)
    assert learner.validate()["alone"] < 0.8 * before
    make_comparable_alone(module, learner)
    assert all(torch.equal(module.state_dict()[name], value) for name, value in others.items())
    branch = module.last_branch
    assert branch.alone is not None
    with torch.no_grad():
        logits = learner.shown(torch.arange(len(bank.run)))
    above = (logits - near_knots(bank.timestep) @ branch.alone_levels.T) * branch.alone_gains
    unsafe, late = bank.asked[:, 0] > 0, bank.timestep < 700
    assert float((above[unsafe & late] > 0).float().mean()) > 0.95
    assert float((above[~unsafe] > 0).float().mean()) < 0.25  # a level is read off four clean runs here


@torch.no_grad()
def test_calibration_sets_a_level_at_every_knot_and_evens_out_the_concepts() -> None:
    module = small_module(alone=True)
    generator = torch.Generator().manual_seed(0)
    timestep = torch.linspace(1000, 0, KNOTS)
    runs = RecordedRuns(
        *torch.randn(2, 60, KNOTS, 4, 16, 16, generator=generator).half(), timestep,
        torch.randn(60, TOKENS, WIDTH, generator=generator).half(),
    )  # fmt: skip
    set_levels(module, runs)
    branch = module.last_branch
    assert branch.alone is not None
    expected = shown_estimate(runs.denoised.flatten(0, 1))
    shown = module.features(runs.latent.flatten(0, 1).float(), timestep.repeat(60), expected).shown
    assert shown is not None
    logits = shown.reshape(60, KNOTS, 3)
    near = [logits[:, max(0, place - 1) : place + 2].amax(dim=1) for place in range(KNOTS)]
    by_tail = torch.stack([tail_level(reached) for reached in reversed(near)], dim=1)
    moved = branch.alone_levels - by_tail
    torch.testing.assert_close(moved, moved[:, :1].expand(-1, KNOTS), atol=4e-3, rtol=4e-3)  # alike at every knot
    highest = torch.quantile(torch.from_numpy(highest_logits(module, runs)), 1 - RATE, dim=0)
    torch.testing.assert_close(highest, torch.zeros_like(highest), atol=1e-2, rtol=0)


@pytest.fixture(scope="module")
def eager() -> Any:
    return load_pipeline()


@torch.no_grad()
def test_the_shipped_module_sees_what_is_drawn_in_the_first_fifth_whatever_the_prompt_says(eager: Any) -> None:
    prompts = [
        "a church",
        "a church and a tree",
        "a crown in ink style",
        "a cat in ink style",
        "an axe",
        "a bow beside a dog",
    ]
    rewrites = [
        "a house", "a house and a tree", "a crown in glossy style", "a cat in glossy style", "a balloon", "a balloon and a dog",
    ]  # fmt: skip
    module = SafetyModule.load(SHIPPED_SAFETY)
    embeds, empty = encode(eager, [*prompts, *rewrites])[1], encode(eager, [""])[1]
    seeds = 2 * list(range(900, 900 + len(prompts)))
    drawn = sample(eager, embeds, empty, initial_noise(eager, seeds), steps=25, guidance_scale=5.0)
    expected = shown_estimate(drawn.denoised)
    bounds = torch.tensor([concept.threshold for concept in module.config.concepts])
    fires = torch.stack([
        module.score(latent.float(), drawn.timesteps.float(), empty.float().expand(25, -1, -1), ahead).score >= bounds
        for latent, ahead in zip(drawn.latents, expected, strict=True)
    ])  # fmt: skip
    unsafe, safe = fires.split(len(prompts))
    asked = torch.arange(3).repeat_interleave(2)
    early = unsafe[torch.arange(len(prompts)), :5, asked].any(dim=1)
    assert int(early.sum()) >= len(prompts) - 1
    assert not safe.any()


def test_some_parts_are_taught_and_the_others_stay(eager: Any, tmp_path: Path) -> None:
    source, options = WorldPrompts(["church"], load_split()), {"runs": 4, "pairs": 12, "samplings": [(3, 5.0)]}
    start = train(eager, source, tmp_path / "whole", steps=1, **options)
    start.config = structs.replace(
        start.config,
        concepts=tuple(structs.replace(concept, threshold=0.875, alpha_scale=1.8) for concept in start.config.concepts),
        promise=SafetyModule.load(SHIPPED_SAFETY).config.promise,
    )
    taught = train(eager, source, tmp_path / "more", steps=2, start=start, only=["redirector"], **options)
    changed = {name for name, value in taught.state_dict().items() if not torch.equal(value, start.state_dict()[name])}
    assert changed
    assert all(".redirector." in name for name in changed)
    assert taught.config.concepts == start.config.concepts
    assert taught.config.provenance["only"] == ["redirector"]
    assert taught.config.promise == start.config.promise  # the detector is as it was
    words = train(eager, source, tmp_path / "words", steps=1, start=start, only=["words"], **options)
    assert words.config.promise is None
    with pytest.raises(TrainingError, match="no part colour to teach; expected together, words, alone, redirector"):
        train(eager, source, tmp_path / "no", start=start, only=["colour"])
    with pytest.raises(TrainingError, match="give a module to start from"):
        train(eager, source, tmp_path / "no", only=["alone"])
    with pytest.raises(TrainingError, match="all parts must be taught of ink"):
        train(eager, WorldPrompts(["ink"], load_split()), tmp_path / "no", start=start, only=["alone"])
    start, source = SafetyModule.load(SHIPPED_SAFETY), WorldPrompts(["ink"], load_split())
    with pytest.raises(TrainingError, match="has church, ink, weapons: name these, in this order, or teach all parts of ink"):
        train(eager, source, tmp_path / "no", start=start, only=["redirector"])
