"""The embedded task: right answers, and nothing of the test split seen before the test."""

import itertools
import re
from collections import Counter

import pytest

from word_tasks import SKILLS, VOWELS, instruction_rows, is_test, statements

TRAIN = instruction_rows(4800, test=False, seed=0)
TEST = instruction_rows(320, test=True, seed=0)
LINES = list(itertools.islice(statements(0), 20_000))


def expected(instruction: str, x: str) -> str:
    """A second way to every answer, found by a word of the request."""
    if "backwards" in instruction or "from the last" in instruction:
        return "".join(x[i] for i in range(len(x) - 1, -1, -1))
    if "Shout" in instruction or "big" in instruction:
        return "".join(chr(ord(c) - 32) for c in x)
    if "How many" in instruction or "Count" in instruction:
        return str(sum(1 for _ in x))
    if "first" in instruction:
        return next(iter(x))
    if "comes last" in instruction or "final" in instruction:
        return list(x).pop()
    if "consonants" in instruction or "a, e" in instruction:
        return re.sub(f"[^{VOWELS}]", "", x)
    if "two times" in instruction or "Repeat" in instruction:
        return f"{x}{x}"
    left, right = map(int, x.split("+"))
    return str(left + right)


def test_every_answer_is_right():
    for row in TRAIN + TEST:
        assert row["output"] == expected(row["instruction"], row["input"]), row


def test_no_word_or_sum_of_the_test_rows_is_in_the_training_rows():
    assert not {row["input"] for row in TRAIN} & {row["input"] for row in TEST}
    assert all(is_test(row["input"]) for row in TEST)


def subject(line: str) -> str:
    """The word or sum that a statement is about."""
    return re.split(r" reversed|:| in capitals| has| starts| ends| twice| is| are", line)[0].split()[-1]


def test_no_word_or_sum_of_the_test_rows_is_in_the_pretraining_statements():
    subjects = {subject(line) for line in LINES}
    assert len(subjects) > 5_000
    assert not any(is_test(s) for s in subjects)
    assert not {row["input"] for row in TEST} & subjects


def test_no_instruction_is_a_pretraining_sentence():
    text = "\n".join(LINES)
    for skill in SKILLS:
        for instruction in skill.instructions:
            assert instruction not in text


def test_skills_have_equal_shares_and_rows_are_distinct():
    by_skill = Counter(next(s.name for s in SKILLS if row["instruction"] in s.instructions) for row in TEST)
    assert set(by_skill.values()) == {len(TEST) // len(SKILLS)}
    assert len({(row["instruction"], row["input"]) for row in TRAIN}) == len(TRAIN)


@pytest.mark.parametrize("test", [False, True])
def test_the_same_seed_makes_the_same_rows_and_another_seed_others(test):
    assert instruction_rows(40, test=test, seed=3) == instruction_rows(40, test=test, seed=3)
    assert instruction_rows(40, test=test, seed=3) != instruction_rows(40, test=test, seed=4)
