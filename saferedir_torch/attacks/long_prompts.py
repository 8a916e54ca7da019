"""Families to train against alone: prompts among sentences about other things, and prompts with words about the prompt.

They stand in for what attackers write around a concept, and share no sentence with the families that attacks are tested with
(`text_families.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from saferedir_torch.attacks.text_families import Target

#: Sentences are one of each, and at times the last.
WHO = (
    "our neighbour", "the teacher", "a stranger", "my uncle", "her cousin", "the children", "some visitors", "an old friend",
    "the engineer", "both twins", "the whole class", "a quiet student", "your colleague", "the caretaker", "his parents",
    "three travellers", "the new owner", "a nurse", "the postman", "several people", "no one", "i", "you", "she",
)  # fmt: skip
DID = (
    "remembered", "waited for", "talked of", "counted", "repaired", "forgot", "wrote down", "asked about", "looked after",
    "returned", "explained", "borrowed", "sold", "wanted", "measured", "cleaned", "lost", "found", "described", "liked",
    "promised", "finished", "carried", "compared", "noticed", "ordered",
)  # fmt: skip
WHAT = (
    "the tickets", "a long list", "every page", "the old recipe", "an answer", "two empty boxes", "the same story",
    "a broken chair", "the timetable", "some paper", "their plans", "the last lesson", "a small mistake", "the office door",
    "a heavy bag", "the results", "dinner", "a phone call", "the wrong address", "a pair of shoes", "the first chapter",
    "all the details", "a bottle of water", "the questions", "the noise", "a winter coat", "the rent",
)  # fmt: skip
WHEN = (
    "on monday", "last year", "before lunch", "in the evening", "for days", "without a word", "near the river", "at work",
    "again and again", "at the station", "in a hurry", "during the holidays", "by accident", "with great care", "downstairs",
    "as usual", "in the end", "far from here", "at noon", "since then",
)  # fmt: skip
#: Common English words, none of which is in a name of what the embedded world draws, nor in an attack that is tested.
EVERYDAY_WORDS = tuple((Path(__file__).parent / "everyday_words.txt").read_text().split())
#: Those that sentences are made of, one by one, and many more.
WORDS = tuple(dict.fromkeys([*(word for phrase in (*WHO, *DID, *WHAT, *WHEN) for word in phrase.split()), *EVERYDAY_WORDS]))
CONSONANTS, VOWELS = "bcdfghjklmnprstvwz", ("a", "e", "i", "o", "u", "ai", "ea", "oo", "ou")
JOINTS = (", ", ". ", " and ", "; ", ", then ", " while ", ", so ", " - ", ": ")
#: Words of a prompt at which nothing more is put around it: Stable Diffusion reads 77 tokens.
LONGEST = 40
#: None of them allows, forbids or denies anything: that is for the family `injection`, which is tested with.
FRAMES = (
    "please draw {prompt}", "{prompt}, thank you", "once more: {prompt}", "i would like to see {prompt}", "{prompt} please",
    "the picture that we spoke of: {prompt}", "a test picture, {prompt}", "for my homework, {prompt}", "{prompt}, as agreed",
    "make it nice: {prompt}", "{prompt}, and nothing else", "my teacher asked for {prompt}", "number four, {prompt}",
    "{prompt}, for a children's book", "new task: {prompt}", "the title says little, {prompt}", "{prompt}, as large as you can",
    "translate and draw: {prompt}", "step one, listen. step two, {prompt}", "{prompt} {prompt}", "yes yes yes {prompt}",
    "question: what is this? answer: {prompt}", "{prompt}, {prompt}, {prompt}", "one two three {prompt} three two one",
)  # fmt: skip


def longer(target: Target, rng: np.random.Generator) -> str:
    """The prompt somewhere among one to five sentences about other things, as many as there is room for."""
    before, after = "", ""
    for _ in range(int(rng.integers(1, 6))):
        sentence, joint = _sentence(rng), _any(JOINTS, rng)
        if len(f"{before} {target.prompt} {after} {sentence}".split()) > LONGEST:
            break
        if rng.random() < 0.7:
            before = f"{sentence}{joint}{before}"
        else:
            after = f"{after}{joint}{sentence}"
    return f"{before}{target.prompt}{after}"


def framed(target: Target, rng: np.random.Generator) -> str:
    """The prompt among words that are about the prompt itself."""
    return _any(FRAMES, rng).format(prompt=target.prompt)


def among_words(target: Target, rng: np.random.Generator) -> str:
    """The prompt among words that make no sentence, half of them of no language: up to twenty-four."""
    count = min(int(rng.integers(1, 25)), LONGEST - len(target.prompt.split()))
    words = [_any(WORDS, rng) if rng.random() < 0.5 else _no_word(rng) for _ in range(max(1, count))]
    gap, (joint, other) = _any((" ", ", "), rng), (_any(JOINTS, rng) for _ in range(2))
    before, after = (gap.join(part) for part in np.split(words, [int(rng.integers(len(words) + 1))]))
    return (f"{before}{joint}" if before else "") + target.prompt + (f"{other}{after}" if after else "")


def _no_word(rng: np.random.Generator) -> str:
    """Two syllables or three, and at times a letter more."""
    syllables = [_any(CONSONANTS, rng) + _any(VOWELS, rng) for _ in range(int(rng.integers(2, 4)))]
    return "".join(syllables) + (_any(CONSONANTS, rng) if rng.random() < 0.5 else "")


def _sentence(rng: np.random.Generator) -> str:
    """Of its parts, or of four to ten words that make none."""
    if rng.random() < 0.5:
        return " ".join(_any(WORDS, rng) for _ in range(int(rng.integers(4, 11))))
    words = [_any(WHO, rng), _any(DID, rng), _any(WHAT, rng)]
    return " ".join([*words, _any(WHEN, rng)] if rng.random() < 0.6 else words)


def _any(choices: Sequence[str], rng: np.random.Generator) -> str:
    return choices[int(rng.integers(len(choices)))]
