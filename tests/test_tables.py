"""The evaluation's tables at a handful of pictures: what they count, and that they count it right."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.drawing import DEPLOYED, USUAL, Setting, Studio, plain_of
from benchmarks.first_step import fired_at_first
from benchmarks.mechanisms import HIGHEST, Mechanism, by_picture
from benchmarks.plan import STEP_SECONDS, picture_steps
from benchmarks.prompt_files import read_prompts
from benchmarks.report import NETWORKS
from benchmarks.tables import ablation, amplified, attacks, envelope, settings, unfamiliar
from benchmarks.test_sets import unsafe_set
from saferedir.runtime import Pipeline
from saferedir.runtime.schedulers import SCHEDULERS
from saferedir_torch.controller import Controller
from saferedir_torch.models import SHIPPED_SAFETY
from saferedir_torch.safety_module import SafetyModule
from saferedir_torch.world.captions import all_names
from saferedir_torch.world.judge import Judge
from saferedir_torch.world.prompts import CONCEPTS
from saferedir_torch.world.split import load_split

SPLIT = load_split()
PROMPTS, SEEDS = ["a church on blue", "a cat on blue"], [3, 4]


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Studio:
    return Studio(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module", autouse=True)
def few(few_steps: None) -> Iterator[None]:
    """Judges' thresholds are set on pictures of three steps."""
    yield


@pytest.mark.parametrize(("name", "count"), [("everyday", 300), ("foreign", 212), ("asking", 24)])
def test_a_file_of_prompts_holds_as_many_as_it_says_and_none_twice(name: str, count: int) -> None:
    prompts = [prompt for own in read_prompts(name).values() for prompt in own]
    assert len(prompts) == len(set(prompts)) == count


@pytest.mark.parametrize("name", ["everyday", "foreign"])
def test_no_prompt_without_a_concept_says_a_concepts_name(name: str) -> None:
    said = [f" {prompt.lower()} " for own in read_prompts(name).values() for prompt in own]
    names = {phrase for concept in CONCEPTS.values() for key in concept.named_by for phrase in all_names()[key]}
    assert len(names) > 70
    assert [(phrase, prompt) for phrase in sorted(names) for prompt in said if f" {phrase} " in prompt.replace(",", " ")] == []


def test_an_empty_line_is_an_empty_prompt_and_a_header_is_none() -> None:
    foreign = read_prompts("foreign")
    assert foreign["empty and nearly so"][:2] == ["", " "]
    assert "#include <stdio.h>" in foreign["science and code"]
    assert not any(line.startswith("# ") for own in foreign.values() for line in own)


def test_pictures_of_another_setting_are_drawn_anew_and_of_the_same_are_kept(
    studio: Studio, pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = studio.draw(pipeline, DEPLOYED, PROMPTS, SEEDS, "", Setting(2))
    others = [Setting(3), Setting(2, guidance=1.0), Setting(2, scheduler="euler")]
    drawn = [studio.draw(pipeline, DEPLOYED, PROMPTS, SEEDS, "", setting) for setting in others]
    assert [own.score.shape[1] for own in drawn] == [3, 2, 2]
    assert all((own.pixels != first.pixels).any() for own in drawn)
    monkeypatch.setattr("benchmarks.drawing._collect", lambda *_: pytest.fail("drawn again"))
    assert (studio.draw(pipeline, DEPLOYED, PROMPTS, SEEDS, "", Setting(2)).pixels == first.pixels).all()


def test_a_setting_that_is_not_drawn_says_why(pipeline: Pipeline) -> None:
    assert Setting(2).refusal(pipeline) == ""
    assert "magic" in Setting(2, scheduler="magic").refusal(pipeline)
    assert "num_inference_steps is 0" in Setting(0).refusal(pipeline)


def test_what_fires_in_the_first_step_alone_is_what_its_record_says(studio: Studio, pipeline: Pipeline) -> None:
    heard = fired_at_first(studio, pipeline, DEPLOYED, PROMPTS, SEEDS, Setting(4))
    recorded = studio.draw(pipeline, DEPLOYED, PROMPTS, SEEDS, "", Setting(4)).fired[:, 0]
    assert heard.tolist() == recorded.tolist() == [[True, False, False], [False, False, False]]


def test_the_envelope_spreads_its_pictures_evenly_and_keeps_to_what_is_drawn(studio: Studio, pipeline: Pipeline) -> None:
    size = envelope.Size(pictures=2 * len(SCHEDULERS), first=3, steps=(4,), guidance=(1.0, 5.0), donut_steps=(4,))
    figures = envelope.envelope(studio, pipeline, DEPLOYED, SPLIT, Judge.load(NETWORKS / "judge"), size)
    assert figures["refused"] == {}
    assert [row["of"] for row in figures["by"]["scheduler"].values()] == [2] * len(SCHEDULERS)
    assert [row["of"] for row in figures["by"]["guidance"].values()] == [len(SCHEDULERS)] * 2
    assert figures["fired"]["of"] == size.pictures
    assert figures["fired"]["hits"] == len(figures["fired_prompts"])
    same = figures["bit_identical_where_nothing_fired"]
    assert same["hits"] == same["of"] == size.pictures - figures["fired"]["hits"]
    assert figures["first_step"]["4"]["of"] == 3
    assert 0 <= figures["likelihood"] <= 1


def test_a_sampler_that_is_refused_is_named_and_the_others_are_drawn(studio: Studio, pipeline: Pipeline) -> None:
    size = replace(settings.QUICK, schedulers=("magic", "euler"), steps=(2,))
    figures = settings.settings(studio, pipeline, DEPLOYED, SPLIT, size)
    assert list(figures["refused"]) == ["magic, 2 steps"]
    assert list(figures["fsr"]["scheduler"]) == ["euler"]
    assert figures["shown_unprotected"]["of"] == len(CONCEPTS) * 2
    assert figures["fsr"]["all"]["of"] == figures["shown_unprotected"]["hits"] > 0
    assert len(figures["missed"]) == figures["fsr"]["all"]["of"] - figures["fsr"]["all"]["hits"]


def test_unfamiliar_prompts_count_where_no_judge_sees_a_concept(studio: Studio, pipeline: Pipeline) -> None:
    figures = unfamiliar.unfamiliar(studio, pipeline, DEPLOYED, SPLIT, replace(unfamiliar.QUICK, steps=(2,)))
    assert list(figures["files"]) == ["everyday", "foreign"]
    for name, by_steps in figures["files"].items():
        row = by_steps["2"]
        assert row["pictures"] == len(read_prompts(name))
        assert row["fired_without_a_concept"]["of"] == row["pictures"] - row["show_a_concept"]["hits"]
        assert row["fired_without_a_concept"]["hits"] == len(row["fired_prompts"])
        assert row["kept_where_fired"]["of"] == sum(entry["showed"] is not None for entry in row["fired_prompts"])
    assert list(figures["asking"]["2"]) == list(read_prompts("asking"))


def test_embeddings_lie_between_the_safe_prompt_and_the_unsafe_one(pipeline: Pipeline) -> None:
    pairs = unsafe_set(CONCEPTS["church"], SPLIT, "seen", 2, 1).pairs
    safe, unsafe = (pipeline.encode(texts) for texts in ([pair.safe for pair in pairs], [pair.unsafe for pair in pairs]))
    half, all_of_it = (amplified.embeddings(pipeline, pairs, share) for share in (0.5, 1.0))
    assert (half.negative == safe).all() and (all_of_it.negative == safe).all()
    assert np.allclose(all_of_it.prompt, unsafe, atol=1e-6)
    assert np.allclose(half.prompt, (safe + unsafe) / 2, atol=1e-6)


def test_amplified_embeddings_are_attacks_where_both_judges_see_the_concept(studio: Studio, pipeline: Pipeline) -> None:
    figures = amplified.amplified(studio, plain_of(pipeline), "plain", SPLIT, amplified.QUICK)
    # Without safety every attack gets through.
    assert figures["asr"]["share"] == figures["agreed"]["share"] == 1
    assert 0 < figures["asr"]["of"] <= len(CONCEPTS) * 2 == 6
    assert sum(row["of"] for row in figures["by"]["concept"].values()) == figures["asr"]["of"]


@pytest.mark.slow
def test_leaving_out_nothing_changes_nothing_and_leaving_out_the_detector_does(studio: Studio) -> None:
    module = SafetyModule.load(SHIPPED_SAFETY)

    def deaf(own: SafetyModule) -> Controller:
        for branch in own.each_branch():
            branch.centre[0].fill_(HIGHEST)
        return Controller(own)

    rows = ablation.ablation(
        studio, module, SPLIT, ablation.QUICK, None,
        [Mechanism("nothing more", Controller), Mechanism("all of it", deaf)],
    )["rows"]  # fmt: skip
    assert {**rows["nothing more"], "recalibrated": None} == {**rows["nothing"], "recalibrated": None}
    assert rows["nothing"]["detected_early"]["hits"] > rows["all of it"]["detected_early"]["hits"] == 0
    assert rows["all of it"]["fsr"]["hits"] == 0


def test_a_safety_that_does_not_hear_the_words_is_silent_in_the_first_step(studio: Studio) -> None:
    identity, deaf = by_picture(SafetyModule.load(SHIPPED_SAFETY))
    drawn = studio.draw(deaf, identity, ["a church on blue"], [3], "", Setting(25))
    fired = np.flatnonzero(drawn.fired[0].any(axis=1))
    assert len(fired) and fired[0] > 0


def test_attacks_at_fewer_steps_say_so(studio: Studio, pipeline: Pipeline, tmp_path: Path) -> None:
    size = replace(attacks.QUICK, steps=2)
    figures = attacks.attacks(
        studio, pipeline, DEPLOYED, CONCEPTS["church"], SPLIT, size, tmp_path / "sheet.png", ("letter insertion",)
    )
    assert figures["steps"] == 2
    row = figures["families"]["letter insertion"]
    assert row["pictures"] == 2
    assert row["counted"] <= 2


def test_prompts_at_equal_distances_have_more_names_than_the_first_ones() -> None:
    tested = unsafe_set(CONCEPTS["weapons"], SPLIT, "seen", 60, 1)
    spread = tested.spread(20)
    assert len(set(spread.names)) == 20
    assert spread.prompts == tested.prompts[::3]
    assert tested.spread(100).prompts == tested.prompts


def test_all_tables_together_take_at_most_six_hours_of_the_machine_they_are_sized_for() -> None:
    minutes = {table: steps * STEP_SECONDS / 60 for table, steps in picture_steps().items()}
    assert sum(minutes.values()) <= 360, minutes
    assert all(taken > 1 for taken in minutes.values())
    assert USUAL.steps * STEP_SECONDS == pytest.approx(0.375)
