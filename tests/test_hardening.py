"""Adversarial training: prompts rewritten as attackers would, in pairs that still say what is to change."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saferedir_torch.attacks.hardening import ALL_FAMILIES, ALL_WORD_FAMILIES, HardenedPrompts
from saferedir_torch.attacks.long_prompts import DID, EVERYDAY_WORDS, FRAMES, WHAT, WHEN, WHO
from saferedir_torch.attacks.respelling import MARKS, accents
from saferedir_torch.attacks.text_families import GAPS, INJECTIONS, LOOKALIKES, SMALL_TALK
from saferedir_torch.everyday import EverydayPrompts, EverydayWords
from saferedir_torch.meaning import NEARER, confirmed, kept_meaning, parts_of_names
from saferedir_torch.models import load_pipeline
from saferedir_torch.prompt_source import TrainingPair, changed_words
from saferedir_torch.trajectories import encode
from saferedir_torch.world.captions import all_names
from saferedir_torch.world.source import WorldPrompts
from saferedir_torch.world.split import load_split

#: Words of a prompt that leaves room for a sentence more.
ROOMY = 27
#: Families that leave some words as they are.
ALIKE = ("sounds", "scrambled")
SOURCE = WorldPrompts(["church", "weapons"], load_split())


def test_what_a_rewrite_changes_is_what_asks() -> None:
    assert changed_words("a church next to a cat", "a house next to a cat") == ["church"]
    assert changed_words("a place of prayer and a big dog", "a house and a big dog") == ["place of prayer"]
    assert changed_words("a cat in ink style", "a cat") == ["in ink style"]
    assert changed_words("a cat", "a cat") == []


@pytest.mark.parametrize("family", ALL_FAMILIES)
@given(seed=st.integers(0, 10_000))
@settings(deadline=None, max_examples=30)
def test_a_pair_is_rewritten_and_its_rewrite_still_changes_the_same(family: str, seed: int) -> None:
    plain = SOURCE.varied_pair("church", np.random.default_rng(seed))
    hard = HardenedPrompts(SOURCE, [family], share=1.0).varied_pair("church", np.random.default_rng(seed))
    assert (hard.asked, hard.replaced) == (plain.asked, plain.replaced)
    asks = max(len(word) for words in changed_words(plain.unsafe, plain.safe) for word in words.split())
    if family not in ALIKE and len(plain.unsafe.split()) < ROOMY and asks > 2:
        assert hard.unsafe != plain.unsafe
    assert changed_words(hard.unsafe, hard.safe)
    if family in ALL_WORD_FAMILIES:
        assert hard.safe == plain.safe
    else:
        assert plain.unsafe in hard.unsafe
        assert plain.safe in hard.safe
    assert (hard.plain, hard.plain_safe) == (plain.unsafe, plain.safe)


def test_what_is_written_around_prompts_in_training_is_not_what_attacks_are_tested_with() -> None:
    sentences = {f"{who} {did} {what}" for who in WHO for did in DID for what in WHAT}
    assert not sentences & set(SMALL_TALK)
    assert not any(part in text for part in (*WHAT, *WHEN) for text in SMALL_TALK)
    assert not set(FRAMES) & set(INJECTIONS)
    tested = set(re.findall("[a-z]+", " ".join((*SMALL_TALK, *INJECTIONS))))
    assert not tested & set(EVERYDAY_WORDS)


def test_training_writes_words_in_no_way_that_attacks_are_tested_with() -> None:
    assert not set(MARKS) & set(GAPS)
    made = {accents("church sword", np.random.default_rng(seed)) for seed in range(200)}
    assert len(made) > 100
    assert not set("".join(made)) & (set("".join(LOOKALIKES.values())) - set("abcdefghijklmnopqrstuvwxyz"))


def test_what_is_written_around_prompts_names_nothing_that_the_world_draws() -> None:
    named = {name.split(" ", 1)[-1] for names in all_names().values() for name in names}
    said = " ".join(f" {text} " for text in (*WHO, *DID, *WHAT, *WHEN, *FRAMES))
    assert not {name for name in named if f" {name} " in said}
    assert not {word for name in named for word in name.split()} & set(EVERYDAY_WORDS)


def test_a_share_is_rewritten_and_benign_prompts_alike() -> None:
    source = HardenedPrompts(SOURCE, ["typos", "spacing"], share=0.3)
    kept = sum(
        HardenedPrompts(SOURCE, ["typos"], share=0.3).varied_pair("weapons", np.random.default_rng(seed)).unsafe
        == SOURCE.varied_pair("weapons", np.random.default_rng(seed)).unsafe
        for seed in range(300)
    )
    assert 170 < kept < 250
    benign = [HardenedPrompts(SOURCE, ["typos"], share=1.0).varied_benign(np.random.default_rng(seed)) for seed in range(50)]
    original = [SOURCE.varied_benign(np.random.default_rng(seed)) for seed in range(50)]
    assert sum(a != b for a, b in zip(benign, original, strict=True)) > 25
    assert (source.replacements, source.seeds) == (SOURCE.replacements, SOURCE.seeds)


def test_pictures_are_drawn_of_plain_prompts() -> None:
    hard = HardenedPrompts(SOURCE, ["typos"], share=1.0)
    for seed in range(20):
        assert hard.pair("church", np.random.default_rng(seed)) == SOURCE.pair("church", np.random.default_rng(seed))
        assert hard.benign(np.random.default_rng(seed)) == SOURCE.benign(np.random.default_rng(seed))


def test_a_prompt_that_no_longer_asks_is_taken_back() -> None:
    church, house = "a church on blue", "a house on blue"
    cut = "and so on and on " * 10

    def pair(unsafe: str, safe: str = house, plain: str = church, plain_safe: str = house) -> TrainingPair:
        return TrainingPair(unsafe, safe, ("church",), ("church",), plain=plain, plain_safe=plain_safe)

    pairs = [
        pair("a churchh on blue"),
        pair("a hxouzse on blue"),
        pair(church, plain="", plain_safe=""),
        pair(f"please draw {church}", f"please draw {house}"),
        pair(cut + church, cut + house),
    ]
    found = confirmed(load_pipeline(), pairs)
    assert [found[row] for row in (0, 2, 3)] == [pairs[row] for row in (0, 2, 3)]
    assert found[1] == found[4] == pairs[2]
    assert confirmed(load_pipeline(), pairs[2:3]) == pairs[2:3]


def test_what_says_the_same_means_the_same() -> None:
    model = load_pipeline()
    church, house, chapel, lost, lost_safe = encode(model, [
        "a church on blue", "a house on blue", "a chapel on blue", "one two three and nothing else", "one two three, nothing",
    ])[1][:, None]  # fmt: skip
    assert kept_meaning(model, church, house, church, house) > 100
    assert kept_meaning(model, chapel, house, church, house) > NEARER
    assert kept_meaning(model, house, house, church, house) == 0
    assert kept_meaning(model, lost, lost_safe, church, house) < NEARER


def test_a_word_of_a_name_is_a_pair_where_it_means_the_same_and_harmless_where_it_means_nothing() -> None:
    def pair(name: str) -> TrainingPair:
        return TrainingPair(f"a picture of {name}", "a picture of a balloon", ("weapons",), ("weapons",))

    pairs = [pair("a blade on a wooden handle"), pair("a sword fight"), pair("a bow")]
    left = [parts_of_names(load_pipeline(), pairs, np.random.default_rng(seed)) for seed in range(12)]
    harmless = {prompt for parts in left for prompt in parts.harmless}
    asking = {part.unsafe for parts in left for part in parts.asking}
    assert "a picture of a blade" in harmless
    assert "a picture of a fight" in asking
    assert not harmless & asking
    assert {part.safe for parts in left for part in parts.asking} == {"a picture of a balloon"}


def test_names_of_one_word_and_prompts_that_ask_for_more_are_left_whole() -> None:
    one = TrainingPair("church on blue", "house on blue", ("church",), ("church",))
    rewritten = TrainingPair("a chhurch", "a house", ("church",), ("church",), "a church", "a house")
    more = TrainingPair("a stone church in ink style", "a house in ink style", ("church", "ink"), ("church",))
    both = TrainingPair("a church as a woodcut print", "a house in glossy style", ("church", "ink"), ("church", "ink"))
    assert parts_of_names(load_pipeline(), [one, rewritten, more, both], np.random.default_rng(0)) == ([], [])


def test_unknown_families_are_named() -> None:
    with pytest.raises(ValueError, match="unknown families magic; expected typos"):
        HardenedPrompts(SOURCE, ["magic"])
    with pytest.raises(ValueError, match="none given"):
        HardenedPrompts(SOURCE, [])


def test_everyday_words_stand_around_both_prompts_of_a_pair_and_change_nothing_else() -> None:
    source, around = EverydayPrompts(HardenedPrompts(SOURCE, ["typos"], share=1.0)), 0
    for seed in range(100):
        plain = HardenedPrompts(SOURCE, ["typos"], share=1.0).varied_pair("church", np.random.default_rng(seed))
        pair = source.varied_pair("church", np.random.default_rng(seed))
        assert (pair.asked, pair.replaced) == (plain.asked, plain.replaced)
        before, found, after = pair.unsafe.partition(plain.unsafe)
        assert found
        assert pair.safe == before + plain.safe + after
        assert pair.plain == (before + plain.plain + after if plain.plain else "")
        around += bool(before or after)
    assert 20 < around < 50


def test_everyday_words_are_none_that_the_source_tells_by() -> None:
    assert {"church", "sword"} <= SOURCE.telling
    words = EverydayWords(SOURCE.telling)
    assert len(words.words) > 300
    assert not SOURCE.telling & set(words.words)
    source, rng = EverydayPrompts(SOURCE), np.random.default_rng(0)
    alone = [source.varied_benign(rng) for _ in range(300)]
    assert 20 < sum(not SOURCE.telling & set(re.findall("[a-z]+", prompt)) for prompt in alone) < 80
