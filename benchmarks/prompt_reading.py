"""How long the slowest prompt takes to read: `python -m benchmarks.prompt_reading` searches for it and prints JSON.

Reading is what a request costs before the text encoder: checks, plain letters, tokens. Prompts of the longest allowed length
are made of a few letters each: single ones, pairs and runs of random lengths, of everything that pattern and tokenizer treat
differently. The slowest are varied again.
"""

from __future__ import annotations

import json
import platform
import random
import sys
import time
from collections.abc import Callable

from saferedir.engines import DEFAULT_BUNDLE, open_bundle
from saferedir.engines.plain_letters import LOOKALIKES, in_plain_letters
from saferedir.runtime.tokenizer import LONGEST_PROMPT, PromptTokenizer, check_prompt

#: Letters of every kind: plain, look-alike, invisible, marks out of order, expanding, of two to four bytes, spaces.
ALPHABET = (
    "aZ1 .'<|>\n\t\u00a0_\u0441\u0430\u200b\u00ad\u034f\u115f\u3164\ufeff\u0301\u0316\u0345\u05b0\u3099\ufdfa\u2487"
    "\u2170\u33af\u0130\u0390"
    "\u1100\u1161\u11a8\uac01\u65e5\u0968\u0431\u2460\U0001f600\U0001d160\U0001d41a\U0001e950\U00011066\u2126\u01f0\ufb03"
)
ROUNDS, KEPT = 150, 12


def read(tokenizer: PromptTokenizer, prompt: str) -> None:
    """What a pipeline does with a prompt before it encodes it."""
    tokenizer(in_plain_letters(check_prompt(prompt)))


def candidates(picked: random.Random) -> list[str]:
    """Prompts of one letter, of every two, and of random ones."""
    letters = [*ALPHABET, *(looks[0] for looks in LOOKALIKES.values())]
    made = [letter * LONGEST_PROMPT for letter in letters]
    made += [(one + other) * (LONGEST_PROMPT // 2) for one in ALPHABET for other in ALPHABET if one < other]
    made += ["".join(picked.choice(letters) for _ in range(LONGEST_PROMPT)) for _ in range(20)]
    made.append("".join(map(chr, range(0x4E00, 0x4E00 + LONGEST_PROMPT))))  # no letter twice
    made.append("".join(chr(0x80 + index) for index in range(LONGEST_PROMPT)))
    return made


def varied(prompt: str, picked: random.Random) -> str:
    """Runs of the prompt's letters, and of one more, of random lengths."""
    letters = [*sorted(set(prompt[:20])), picked.choice(ALPHABET)]
    text = ""
    while len(text) < LONGEST_PROMPT:
        text += picked.choice(letters) * picked.choice((1, 1, 2, 5, 50))
    return text[:LONGEST_PROMPT]


def milliseconds(tokenizer: PromptTokenizer, prompt: str, times: int, clock: Callable[[], float] = time.perf_counter) -> float:
    """The shortest of several calls, since a machine is shared."""
    taken = []
    for _ in range(times):
        begun = clock()
        read(tokenizer, prompt)
        taken.append(clock() - begun)
    return 1000 * min(taken)


def main() -> None:
    """Print the slowest prompt that was found, and how long it took."""
    bundle = open_bundle(DEFAULT_BUNDLE)
    assert bundle.manifest.model is not None
    tokenizer = PromptTokenizer(bundle.read("tokenizer.json"), bundle.manifest.model.prompt_tokens)
    picked = random.Random(0)
    tried = candidates(picked)
    timed = sorted(((milliseconds(tokenizer, prompt, 2), prompt) for prompt in tried), reverse=True)[:KEPT]
    for _ in range(ROUNDS):
        prompt = varied(picked.choice(timed)[1], picked)
        timed = sorted([*timed, (milliseconds(tokenizer, prompt, 2), prompt)], reverse=True)[:KEPT]
    again = sorted(((milliseconds(tokenizer, prompt, 9), prompt) for _, prompt in timed), reverse=True)
    slowest = again[0][1]
    report = {
        "characters": LONGEST_PROMPT,
        "prompts": len(tried) + ROUNDS,
        "slowest": [{"ms": round(took, 2), "letters": ascii("".join(sorted(set(prompt)))[:12])} for took, prompt in again[:5]],
        "cpu_ms": round(milliseconds(tokenizer, slowest, 9, time.process_time), 2),
        "half_as_long_ms": round(milliseconds(tokenizer, slowest[: LONGEST_PROMPT // 2], 9), 2),
        "machine": platform.machine(),
        "python": sys.version.split()[0],
    }
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
