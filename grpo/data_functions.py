"""Small programming problems, generated: one function of one argument, described in a sentence, tested by calls.

For recipes on a CPU: a model of a hundred million parameters solves some of them and not others.
"""

from __future__ import annotations

import hashlib
import random
import string
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from grpo.config import ConfigError
from grpo.data import Row

INTS = tuple(range(-12, 41))
WORDS = ("banana", "kayak", "programming", "a", "level", "Mississippi", "reinforcement", "zebra crossing", "", "toolkit")
LISTS: tuple[list[int], ...] = ([3, 1, 2], [], [5, 5, 5, 2], [10, -4, 7, 0, 3], [9], [2, 4, 6, 8, 10, 12], [-1, -2, 3], [7, 8, 9, 5, 6])


@dataclass(frozen=True, slots=True)
class Family:
    """Functions that differ by a number ``k``: what they return in words and in Python, and what they are called with."""

    words: str
    python: str  # of x and k
    inputs: tuple[Any, ...]


FAMILIES = (
    Family("x plus {k}", "x + {k}", INTS),
    Family("x minus {k}", "x - {k}", INTS),
    Family("{k} minus x", "{k} - x", INTS),
    Family("x times {k}", "x * {k}", INTS),
    Family("x squared plus {k}", "x ** 2 + {k}", INTS),
    Family("x divided by {k}, rounded down", "x // {k}", INTS),
    Family("the remainder of x divided by {k}", "x % {k}", INTS),
    Family("the maximum of x and {k}", "max(x, {k})", INTS),
    Family("the minimum of x and {k}", "min(x, {k})", INTS),
    Family("the absolute value of x minus {k}", "abs(x - {k})", INTS),
    Family("True if x is greater than {k}, else False", "x > {k}", INTS),
    Family("True if x is divisible by {k}, else False", "x % {k} == 0", INTS),
    Family("the first {k} characters of the string x", "x[:{k}]", WORDS),
    Family("the last {k} characters of the string x", "x[-{k}:]", WORDS),
    Family("the string x repeated {k} times", "x * {k}", WORDS),
    Family("the length of the string x plus {k}", "len(x) + {k}", WORDS),
    Family("the sum of the list x plus {k}", "sum(x) + {k}", LISTS),
    Family("how often {k} occurs in the list x", "x.count({k})", LISTS),
    Family("the list x with {k} added at its end", "x + [{k}]", LISTS),
    Family("a list of the items of x times {k}", "[item * {k} for item in x]", LISTS),
)


def small_functions(split: str, *, seed: int = 0, low: int = 2, high: int = 13, share: float = 0.2, cases: int = 8) -> list[Row]:
    """One problem for each family and each ``k`` from ``low`` to ``high``. A problem is held out by its own hash, whatever the seed.

    Args:
        share: of the problems, for evaluation.
        cases: arguments that a function is tested with; the first three are chosen near ``k``.
    """
    if not (1 <= low <= high and 0 < share < 1 and cases >= 4):
        found = f"low={low}, high={high}, share={share}, cases={cases}"
        raise ConfigError("data.problems", found, "use 1 ≤ low ≤ high, 0 < share < 1, cases ≥ 4")
    names = [(family, k) for family in FAMILIES for k in range(low, high + 1)]
    rows = [_row(family, k, cases) for family, k in names if (_hash(family.words, k) < share) == (split == "heldout")]
    random.Random(f"small_functions/{seed}" if split == "train" else "small_functions/heldout").shuffle(rows)
    return rows


def _row(family: Family, k: int, cases: int) -> Row:
    python = family.python.format(k=k)
    function: Callable[[Any], Any] = eval(f"lambda x: {python}")  # our own text
    near = _near(family, k)
    far = [x for x in family.inputs if x not in near]
    inputs = [*near, *random.Random(f"{family.words}/{k}").sample(far, min(cases - len(near), len(far)))]
    return {
        "question": f"Write a function f(x) that returns {family.words.format(k=k)}.",
        "answer": f"def f(x):\n    return {python}\n",
        "tests": {"kind": "call", "function": "f", "cases": [{"args": [x], "expected": function(x)} for x in inputs]},
    }


def _near(family: Family, k: int) -> list[Any]:
    """Arguments that tell ``k`` from its neighbours: most others are, say, greater than both 3 and 4, or neither."""
    if family.inputs is INTS:
        return [k, k + 1, 2 * k]
    if family.inputs is WORDS:
        text = string.ascii_letters
        return [text[:k], text[: k + 1], text[: 2 * k]]
    return [[k], [k + 1, k, k], [1, 2 * k, k + 1]]


def _hash(words: str, k: int) -> float:
    """A number in [0, 1) that depends on the problem alone."""
    digest = hashlib.blake2b(f"{words}/{k}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64
