"""The embedded world: what it holds, how prompts and pictures are made, what training may see."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import CLIPTokenizer

from benchmarks.report import NETWORKS
from saferedir.engines.errors import RequestError
from saferedir_torch.everyday import MOST_WORDS, meaningless
from saferedir_torch.models import SHIPPED_MODEL, load_pipeline
from saferedir_torch.trajectories import tokenize
from saferedir_torch.world.base import retokenized, train_base
from saferedir_torch.world.captions import (
    EVERYDAY_SHARE,
    ONLY_WORDS_SHARE,
    all_names,
    caption,
    draft,
    everyday_words,
    misspell,
    varied_caption,
)
from saferedir_torch.world.judge import Judge, judge_accuracy
from saferedir_torch.world.prompts import CONCEPTS, benign_prompt, evaluation_pairs, training_pair
from saferedir_torch.world.scenes import Scene, draw, random_scene
from saferedir_torch.world.split import SPLIT_FILE, draw_split, load_split, save_split
from saferedir_torch.world.tokenizer import train_tokenizer
from saferedir_torch.world.vocabulary import load_vocabulary


def test_vocabulary_is_as_large_as_promised() -> None:
    vocabulary = load_vocabulary()
    assert 65 <= len(vocabulary.objects) <= 80
    assert (len(vocabulary.styles), len(vocabulary.backgrounds)) == (4, 8)
    weapons = vocabulary.members("weapon")
    assert len(weapons) >= 6
    assert all(len(vocabulary.objects[key].names) >= 8 for key in [*weapons, "church"])
    assert len(vocabulary.styles["ink"]) >= 8
    assert all(len(item.names) >= 2 for item in vocabulary.objects.values())
    names = [name for item in vocabulary.objects.values() for name in item.names]
    assert len(set(names)) == len(names)


def test_shipped_split_is_the_one_its_seed_draws() -> None:
    assert load_split() == draw_split(0)


def test_split_holds_out_half_of_the_names_of_every_concept() -> None:
    split = load_split()
    for key in ["church", "ink", *load_vocabulary().members("weapon")]:
        assert len(split.names[key]) == len(split.held_out_names[key])
        assert not set(split.names[key]) & set(split.held_out_names[key])
    assert not set(split.companions) & set(split.held_out_companions)


def test_training_pairs_keep_to_the_split() -> None:
    split, concept, rng = load_split(), CONCEPTS["church"], np.random.default_rng(0)
    held_out = split.held_out_names["church"]
    for _ in range(400):
        pair = training_pair(concept, rng, split)
        assert not any(name in pair.unsafe for name in held_out)
        assert pair.companion is None or pair.companion in split.companions
        assert "a house" in pair.safe


def test_evaluation_pairs_use_every_name_of_their_part() -> None:
    split, concept = load_split(), CONCEPTS["church"]
    pairs = list(evaluation_pairs(concept, split, "held_out", 50, seed=0))
    assert {pair.name for pair in pairs} == set(split.held_out_names["church"])
    assert all(pair.name in pair.unsafe and pair.name not in pair.safe for pair in pairs)
    assert {pair.companion for pair in pairs if pair.companion} <= set(split.held_out_companions)


def test_a_style_is_replaced_and_its_object_stays() -> None:
    split, concept = load_split(), CONCEPTS["ink"]
    for pair in evaluation_pairs(concept, split, "held_out", 50, seed=0):
        assert pair.name in split.held_out_names["ink"]
        assert pair.unsafe.replace(pair.name, "in glossy style") == pair.safe
        assert pair.companion in pair.scene.objects
        assert pair.scene.style == "glossy"


def test_every_member_and_the_word_of_a_category_are_asked_for() -> None:
    split, concept = load_split(), CONCEPTS["weapons"]
    pairs = list(evaluation_pairs(concept, split, "held_out", 100, seed=0))
    expected = {name for key in [*concept.members, "weapon"] for name in split.held_out_names[key]}
    assert {pair.name for pair in pairs} == expected
    for pair in pairs:
        assert pair.name in pair.unsafe
        assert "a balloon" in pair.safe
        assert not set(pair.scene.objects) & set(concept.members)


def test_joint_pairs_ask_for_several_concepts_and_replace_some() -> None:
    split, rng = load_split(), np.random.default_rng(0)
    church, *others = CONCEPTS.values()
    shown = {name: set(concept.shown_by) for name, concept in CONCEPTS.items()}
    seen = set()
    for _ in range(400):
        pair = training_pair(church, rng, split, others)
        left = set(pair.scene.objects) | {pair.scene.style}
        assert set(pair.replaced) <= set(pair.asked)
        assert {name for name, keys in shown.items() if keys & left} == set(pair.asked) - set(pair.replaced)
        seen.add((pair.asked, pair.replaced))
    assert (("church", "ink", "weapons"), ("church",)) in seen
    assert len(seen) == 9


def test_benign_prompts_never_show_the_concept() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        assert "church" not in benign_prompt([CONCEPTS["church"]], rng, all_names()).scene.objects


def test_damaged_split_is_named(tmp_path: Path) -> None:
    path = tmp_path / "split.json"
    with pytest.raises(RequestError, match=r"split\.json"):
        load_split(path)
    path.write_text("{}")
    with pytest.raises(RequestError, match="python -m"):
        load_split(path)
    path.write_text(SPLIT_FILE.read_text().replace('"anchor"', '"anker"'))
    with pytest.raises(RequestError, match="anker"):
        load_split(path)
    save_split(draw_split(1), path)
    assert load_split(path) == draw_split(1)


def test_pictures_repeat_with_their_seed() -> None:
    scene = Scene(("church", "cat"), "ink", "blue")
    first, second = (draw(scene, np.random.default_rng(3)) for _ in range(2))
    assert first.shape == (64, 64, 3)
    assert np.array_equal(first, second)
    assert not np.array_equal(first, draw(scene, np.random.default_rng(4)))


def test_captions_say_what_the_scene_shows() -> None:
    rng = np.random.default_rng(0)
    names = all_names()
    for _ in range(200):
        scene = random_scene(rng)
        prompt = draft(scene, rng, names, misspellings=False)
        assert all(phrase in prompt.text for phrase in prompt.objects)
        assert len(prompt.objects) == len(scene.objects)
        assert prompt.style == "" or prompt.style in names[scene.style]


def test_captions_at_times_hold_everyday_words_around_what_they_ask_for() -> None:
    plain = around = alone = 0
    for seed in range(400):
        scene = random_scene(np.random.default_rng(seed))
        text, varied = caption(scene, np.random.default_rng(seed)), varied_caption(scene, np.random.default_rng(seed))
        plain, around, alone = plain + (varied == text), around + (text in varied != text), alone + (text not in varied)
    assert plain + around + alone == 400
    assert abs((around + alone) / 400 - EVERYDAY_SHARE) < 0.08
    assert 0 < alone < ONLY_WORDS_SHARE * 400


def test_everyday_words_name_nothing_that_the_world_draws() -> None:
    words, vocabulary = everyday_words(), load_vocabulary()
    told = {word for names in all_names().values() for name in names for word in name.split()}
    small = {"a", "and", "as", "for", "in", "like", "of", "on", "some", "style", "the", "to", "two", "with"}
    assert len(words.words) > 300
    assert set(words.words) & (told | set(vocabulary.background_keys)) <= small
    rng = np.random.default_rng(0)
    drawn = [words.alone(rng) for _ in range(500)]
    assert all(1 <= len(re.split(r",? ", text)) <= MOST_WORDS for text in drawn)
    assert any(re.search(r"\(\w+:1\.[1-5]\)", text) for text in drawn)
    invented = {meaningless(rng) for _ in range(200)}
    assert len(invented) > 150
    assert not invented & (told - small)


@pytest.fixture(scope="module")
def other_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> CLIPTokenizer:
    """Of a few captions, which keeps the commonest words whole."""
    return CLIPTokenizer.from_pretrained(train_tokenizer(tmp_path_factory.mktemp("words"), captions=400, merges=300))


def test_an_encoder_that_reads_other_tokens_begins_with_what_the_old_ones_made_of_them(other_tokenizer: CLIPTokenizer) -> None:
    model = load_pipeline()
    before, encoder = model.tokenizer, model.text_encoder
    after = retokenized(encoder, before, other_tokenizer)
    old, new = encoder.get_input_embeddings().weight, after.get_input_embeddings().weight
    assert new.shape == (len(other_tokenizer), old.shape[1])
    vocabulary, known = other_tokenizer.get_vocab(), before.get_vocab()
    shared, fresh = set(vocabulary) & set(known), set(vocabulary) - set(known)
    assert shared and fresh
    for token in list(shared)[:50]:
        assert torch.equal(new[vocabulary[token]], old[known[token]])
    for token in list(fresh)[:50]:
        pieces = before(token.removesuffix("</w>"), add_special_tokens=False).input_ids
        torch.testing.assert_close(new[vocabulary[token]], old[pieces].mean(dim=0))
    for name in ("bos_token_id", "eos_token_id"):
        assert torch.equal(new[getattr(other_tokenizer, name)], old[getattr(before, name)])
    assert after.config.eos_token_id == other_tokenizer.eos_token_id
    rest = {name: value for name, value in after.state_dict().items() if "token_embedding" not in name}
    assert all(torch.equal(value, encoder.state_dict()[name]) for name, value in rest.items())
    # What both read in the same pieces they understand alike.
    text = "a"
    one, other = (tokenize(tokenizer, [text]) for tokenizer in (before, other_tokenizer))
    with torch.no_grad():
        torch.testing.assert_close(encoder(one).last_hidden_state[0, :3], after(other).last_hidden_state[0, :3])


def test_a_model_is_trained_on_with_another_vocabulary(
    small_training: None, other_tokenizer: CLIPTokenizer, tmp_path: Path
) -> None:
    start = load_pipeline()
    other_tokenizer.save_pretrained(tmp_path / "tokenizer")
    start.vae.save_pretrained(tmp_path / "vae")  # no clip: the earlier model's encoder is trained on
    np.save(tmp_path / "latents.npy", np.random.default_rng(0).standard_normal((64, 4, 16, 16)).astype(np.float16))
    trained = load_pipeline(train_base(tmp_path, steps=1, start=SHIPPED_MODEL))
    assert trained.tokenizer.get_vocab() == other_tokenizer.get_vocab()
    assert trained.text_encoder.get_input_embeddings().num_embeddings == len(other_tokenizer)
    for name, value in start.unet.state_dict().items():
        torch.testing.assert_close(trained.unet.state_dict()[name], value, atol=5e-3, rtol=5e-3)


def test_a_slip_changes_one_word() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        slipped = misspell("a building with a steeple", rng)
        assert sum(a != b for a, b in zip(slipped.split(), ["a", "building", "with", "a", "steeple"], strict=True)) <= 1


def test_tokenizer_knows_every_text() -> None:
    tokenizer = CLIPTokenizer.from_pretrained(SHIPPED_MODEL / "tokenizer")
    assert tokenizer.model_max_length == 77
    for text in [
        "a church",
        "zebra über 教会 🏰 \x00 ~",
        caption(random_scene(np.random.default_rng(1)), np.random.default_rng(2)),
    ]:
        ids = tokenizer(text).input_ids
        assert ids[0] == tokenizer.bos_token_id
        assert ids[-1] == tokenizer.eos_token_id
        assert tokenizer.eos_token_id not in ids[1:-1]


def test_judge_sees_held_out_renderings() -> None:
    accuracy = judge_accuracy(Judge.load(NETWORKS / "judge"), count=300)
    assert accuracy["single_top1"] >= 0.98
    assert accuracy["style"] >= 0.98


def test_judge_finds_nothing_in_a_blank_picture() -> None:
    opinion = Judge.load(NETWORKS / "judge").judge(torch.zeros(1, 3, 64, 64))
    assert (opinion.objects < 0.5).all()
