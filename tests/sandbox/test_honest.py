"""Every honest program at every level, in a shuffled order, twice: what one leaves behind must not disturb the next."""

from __future__ import annotations

import ast
import random
from typing import Any

import pytest

from grpo.rewards.sandbox import Limits, Sandbox

LIMITS = Limits(cpu_s=20, wall_s=120)


def test_honest_programs(box: Sandbox, honest: list[Any], seed: int) -> None:
    order = honest * 2
    random.Random(seed).shuffle(order)
    failures = [failure for program in order if (failure := _failure(box, program))]
    assert not failures, "\n".join(failures)


def _failure(box: Sandbox, program: Any) -> str:
    source, *sections = program.source.split("\n--- ")
    texts = {name: text for name, _, text in (section.partition("\n") for section in sections)}
    ((kind, text),) = [each for each in texts.items() if each[0] != "stdin"]
    if kind == "stdout":
        run = box.run(source + "\n", texts.get("stdin", ""), limits=LIMITS)
        good = run.status == "ok" and run.stdout.decode().split() == text.split()
    else:
        cases = [line.split(" -> ") for line in text.splitlines()]
        run = box.call(source + "\n", kind.split()[1], [ast.literal_eval(arguments) for arguments, _ in cases], limits=LIMITS)
        expected = tuple(ast.literal_eval(value) for _, value in cases)
        good = run.status == "ok" and _same(run.values, expected)
    return "" if good else f"{program.name}: {run}"


def _same(left: Any, right: Any) -> bool:
    """Equal, and of the same types, all the way down."""
    if type(left) is not type(right) or left != right:
        return False
    if isinstance(left, dict):
        left, right = [list(pair) for pair in left.items()], [list(pair) for pair in right.items()]
    return not isinstance(left, (list, tuple)) or all(map(_same, left, right))


@pytest.fixture(params=[1, 2])
def seed(request: pytest.FixtureRequest) -> int:
    return request.param
