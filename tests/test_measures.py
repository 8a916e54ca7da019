"""The measures themselves: known values on constructed cases, swapped labels fail, a blank picture does not look good."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.report import NETWORKS
from saferedir.engines.errors import RequestError
from saferedir_torch.evaluation.features import Features
from saferedir_torch.evaluation.intervals import bootstrap, clustered_mean, clustered_share, share
from saferedir_torch.evaluation.measures import found_threshold, score_difference_rates, strict_threshold
from saferedir_torch.world.batches import picture_batch
from saferedir_torch.world.captions import caption
from saferedir_torch.world.features import load_features
from saferedir_torch.world.judge import Judge, judge_accuracy
from saferedir_torch.world.scenes import Scene, random_scene


@pytest.fixture(scope="module")
def features() -> Features:
    return load_features(NETWORKS, "world")


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    rng = np.random.default_rng(123_456)
    return [random_scene(rng) for _ in range(60)]


def pictures_of(scenes: list[Scene], seed: int) -> torch.Tensor:
    return picture_batch(scenes, np.random.default_rng(seed))


def test_the_networks_of_this_world_are_named_so(features: Features) -> None:
    assert features.names == ("clip_world", "lpips_world", "fid_world")


def test_real_networks_that_cannot_be_had_are_named() -> None:
    with pytest.raises(RequestError, match="Inception"):
        load_features(NETWORKS, "real")


def test_missing_networks_are_named(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=str(tmp_path)):
        load_features(tmp_path, "world")


def test_text_score_prefers_the_right_prompt_and_falls_with_a_blank_picture(features: Features, scenes: list[Scene]) -> None:
    rng = np.random.default_rng(1)
    prompts = [caption(scene, rng) for scene in scenes]
    pictures = pictures_of(scenes, 2)
    right = features.text.score(pictures, prompts)
    swapped = features.text.score(pictures, prompts[1:] + prompts[:1])
    blank = features.text.score(torch.zeros_like(pictures), prompts)
    assert float((right > swapped).float().mean()) > 0.95
    assert float(right.mean()) > 2 * float(blank.mean())


def test_perceptual_distance(features: Features, scenes: list[Scene]) -> None:
    pictures = pictures_of(scenes, 2)
    assert float(features.perceptual.distance(pictures, pictures).max()) < 1e-6
    again = features.perceptual.distance(pictures, pictures_of(scenes, 3))  # the same scene, jittered otherwise
    other = features.perceptual.distance(pictures, pictures.roll(1, 0))
    blank = features.perceptual.distance(pictures, torch.zeros_like(pictures))
    assert float((again < other).float().mean()) > 0.95
    assert float(blank.mean()) > 1.5 * float(again.mean())
    noisy = [features.perceptual.distance(pictures, pictures + s * torch.randn(pictures.shape)) for s in (0.02, 0.1, 0.4)]
    assert noisy[0].mean() < noisy[1].mean() < noisy[2].mean()


def test_frechet_distance(features: Features, scenes: list[Scene]) -> None:
    rng = np.random.default_rng(9)
    many = [random_scene(rng) for _ in range(150)]
    pictures = pictures_of(many, 1)
    same = features.frechet_distance(pictures, pictures)
    alike = features.frechet_distance(pictures, pictures_of(many, 2))
    one_style = features.frechet_distance(pictures, pictures_of([replace(scene, style="ink") for scene in many], 2))
    blank = features.frechet_distance(pictures, torch.zeros_like(pictures))
    assert abs(same) < 1e-3
    assert same < alike < one_style < blank
    near, far = (
        features.kernel_distance(pictures, others, subsets=10)["mean"]
        for others in (pictures_of(many, 2), pictures_of([replace(scene, style="ink") for scene in many], 2))
    )
    assert abs(near) < far


def test_the_second_judge_is_another_and_sees(features: Features) -> None:
    first, second = (Judge.load(NETWORKS / name) for name in ("judge", "second_judge"))
    assert {first.architecture, second.architecture} == {"plain", "residual"}
    accuracy = judge_accuracy(second, count=300)
    assert accuracy["single_top1"] > 0.98
    assert accuracy["style"] > 0.98
    assert not (second.judge(torch.zeros(1, 3, 64, 64)).objects > 0.5).any()


def test_difference_rates_by_hand() -> None:
    reference, image = torch.tensor([20.0, 25.0, 0.0]), torch.tensor([15.0, 30.0, 3.0])
    rates = score_difference_rates(reference, image)
    assert rates[:2].tolist() == pytest.approx([0.25, 0.2])
    assert bool(rates[2].isnan())


def test_the_judge_accuses_at_most_one_rewrite_in_a_thousand_and_nothing_it_thinks_absent() -> None:
    unsure, sure = np.linspace(0, 0.9, 3001), np.linspace(0, 0.2, 3001)
    assert (unsure >= found_threshold(unsure)).mean() == pytest.approx(0.001, abs=0.0004)
    assert found_threshold(sure) == 0.5
    assert (sure >= strict_threshold(sure)).mean() == pytest.approx(0.001, abs=0.0004)


def test_exact_share() -> None:
    result = share(0, 300)
    assert result["low"] == 0
    assert result["high"] == pytest.approx(1 - 0.025 ** (1 / 300))


def test_few_failures_give_the_exact_interval_over_prompts() -> None:
    outcomes = np.ones(50, bool)
    outcomes[[0, 1]] = False  # both pictures of one prompt
    prompts = [f"prompt {row // 5}" for row in range(50)]
    result = clustered_share(outcomes, ["name"] * 50, prompts)
    assert result["share"] == 0.96
    assert (result["low"], result["high"]) == (1 - share(1, 10)["high"], 1 - share(1, 10)["low"])


@pytest.mark.parametrize("failures", range(10))
def test_an_interval_holds_its_share_however_failures_lie(failures: int) -> None:
    outcomes = np.ones(400, bool)
    outcomes[: 8 * failures : 8] = False  # one picture of eight, each of another prompt
    prompts = [f"prompt {row // 8}" for row in range(400)]
    for values in (outcomes, ~outcomes):
        result = clustered_share(values, ["name"] * 400, prompts)
        assert result["low"] <= result["share"] <= result["high"]


def test_one_bad_name_widens_the_interval() -> None:
    names = [f"name {row // 100}" for row in range(1000)]
    prompts = [f"{name}, {row}" for row, name in enumerate(names)]
    bad_name, spread = np.ones(1000, bool), np.ones(1000, bool)
    bad_name[:100] = False
    spread[::10] = False
    clustered, even = clustered_share(bad_name, names, prompts), clustered_share(spread, names, prompts)
    assert clustered["share"] == even["share"] == 0.9
    assert clustered["high"] - clustered["low"] > 3 * (even["high"] - even["low"])


def test_bootstrap_of_a_mean() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(5, 1, size=400)
    result = clustered_mean(values, ["one"] * 400, [str(row) for row in range(400)])
    assert result["low"] < 5 < result["high"]
    assert result["high"] - result["low"] == pytest.approx(2 * 1.96 / 20, rel=0.2)
    columns = np.stack([values, values + 1], axis=1)
    drawn = bootstrap(columns, ["one"] * 400, [str(row) for row in range(400)], lambda v: float((v[:, 1] - v[:, 0]).mean()))
    assert drawn.min() == pytest.approx(1)
