"""Small text skills with known answers, told as plain statements (pretraining) or as instructions (fine-tuning).

The two tellings share no sentence, and no word or sum of the test split occurs in a statement or in a training
instruction: `is_test` decides by a hash of the content itself, so no list has to be kept in step.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

CONSONANTS = "bcdfghjklmnprstvwz"
VOWELS = "aeiou"
SHAPES = ("CVC", "CVCV", "VCVC", "CVCVC", "VCVCV", "CVCVCV", "CVCCVC")
TEST_SHARE = 8  # one content in eight belongs to the test split


@dataclass(frozen=True)
class Skill:
    """One operation: how it is computed, stated and asked for."""

    name: str
    answer: Callable[[str], str]
    fact: str  # the short form, in lists of facts about one word
    statements: tuple[str, ...]  # plain sentences that hold {x} and {y}
    instructions: tuple[str, ...]  # requests whose input is {x}; {y} is the wanted output


def _sum(pair: str) -> str:
    left, right = pair.split("+")
    return str(int(left) + int(right))


WORD_SKILLS = (
    Skill(
        "reverse",
        lambda x: x[::-1],
        "reversed {y}",
        ("{x} reversed is {y}", "the reverse of {x} is {y}"),
        ("Spell the word backwards.", "Write this from the last letter to the first."),
    ),
    Skill(
        "upper",
        str.upper,
        "capitals {y}",
        ("{x} in capitals is {y}", "the capital form of {x} is {y}"),
        ("Shout the word.", "Write this in big letters."),
    ),
    Skill(
        "length",
        lambda x: str(len(x)),
        "length {y}",
        ("{x} has length {y}", "the length of {x} is {y}"),
        ("How many letters are there?", "Count the letters of the word."),
    ),
    Skill(
        "first",
        lambda x: x[0],
        "start {y}",
        ("{x} starts with {y}", "the start of {x} is {y}"),
        ("Which letter comes first?", "Give the first letter."),
    ),
    Skill(
        "last",
        lambda x: x[-1],
        "end {y}",
        ("{x} ends with {y}", "the end of {x} is {y}"),
        ("Which letter comes last?", "Give the final letter."),
    ),
    Skill(
        "vowels",
        lambda x: "".join(c for c in x if c in VOWELS),
        "vowels {y}",
        ("{x} has vowels {y}", "the vowels of {x} are {y}"),
        ("Leave out the consonants.", "Keep only a, e, i, o and u."),
    ),
    Skill(
        "twice",
        lambda x: x + x,
        "twice {y}",
        ("{x} twice is {y}", "the double of {x} is {y}"),
        ("Say the word two times.", "Repeat this once more, without a space."),
    ),
)
SUM = Skill(
    "sum",
    _sum,
    "sum {y}",
    ("{x} is {y}", "the sum {x} is {y}"),
    ("Add the two numbers.", "What do these make together?"),
)
SKILLS = (*WORD_SKILLS, SUM)


def is_test(content: str) -> bool:
    """Return whether a word or a sum belongs to the test split."""
    return zlib.crc32(content.encode()) % TEST_SHARE == 0


def draw_word(rng: random.Random) -> str:
    """Draw a pronounceable word of three to six letters."""
    return "".join(rng.choice(CONSONANTS if kind == "C" else VOWELS) for kind in rng.choice(SHAPES))


def draw_sum(rng: random.Random) -> str:
    """Draw a sum of two numbers below 50, such as "17+4"."""
    return f"{rng.randrange(50)}+{rng.randrange(50)}"


def draw_content(rng: random.Random, skill: Skill, *, test: bool) -> str:
    """Draw a word or a sum of the wanted split."""
    while True:
        content = draw_sum(rng) if skill is SUM else draw_word(rng)
        if is_test(content) == test:
            return content


def statements(seed: int) -> Iterator[str]:
    """Yield plain statements without end, about content of the training split only."""
    rng = random.Random(f"statements {seed}")
    while True:
        if rng.random() < 0.2:
            content = draw_content(rng, SUM, test=False)
            yield rng.choice(SUM.statements).format(x=content, y=_sum(content))
        elif rng.random() < 0.5:  # several facts about one word: most of the line can be known
            content = draw_content(rng, WORD_SKILLS[0], test=False)
            facts = (s.fact.format(y=s.answer(content)) for s in rng.sample(WORD_SKILLS, 3))
            yield f"{content}: {', '.join(facts)}"
        else:
            skill = rng.choice(WORD_SKILLS)
            content = draw_content(rng, skill, test=False)
            yield rng.choice(skill.statements).format(x=content, y=skill.answer(content))


def instruction_rows(num_rows: int, *, test: bool, seed: int) -> list[dict[str, str]]:
    """Make distinct rows with the columns instruction, input and output, the skills in equal shares.

    Args:
        num_rows: how many rows.
        test: whether the content comes from the test split.
        seed: the same seed makes the same rows on every machine.
    """
    rng = random.Random(f"instructions {test} {seed}")
    rows: dict[tuple[str, str], dict[str, str]] = {}
    while len(rows) < num_rows:
        skill = SKILLS[len(rows) % len(SKILLS)]
        content = draw_content(rng, skill, test=test)
        instruction = rng.choice(skill.instructions)
        rows[instruction, content] = {"instruction": instruction, "input": content, "output": skill.answer(content)}
    return list(rows.values())
