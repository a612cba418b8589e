"""Rewards that compare character by character."""

from __future__ import annotations

from typing import Any

import pytest

from grpo.rewards.match import exact_match, prefix_match
from grpo.types import Completion, FinishReason, Outcome, Problem


def completion(text: str) -> Completion:
    return Completion(
        problem_id="p", index=0, prompt_ids=(1,), token_ids=(), text=text, logprobs=(), policy_versions=(), finish_reason=FinishReason.stop
    )


PROBLEM = Problem(id="p", prompt="", answer="472")


@pytest.mark.parametrize(
    ("text", "exact", "prefix"), [("472", 1, 1), ("472abc", 0, 1), ("479", 0, 2 / 3), ("972", 0, 0), (" 472", 0, 0), ("", 0, 0)]
)
def test_matches(text: str, exact: float, prefix: float) -> None:
    assert exact_match(completion(text), PROBLEM).value == exact
    assert prefix_match(completion(text), PROBLEM) == pytest.approx(prefix)


@pytest.mark.parametrize(
    ("text", "options", "value"),
    [
        (" 472\n", {"strip": True}, 1),
        (" 4 72", {"strip": True}, 0),
        ("<think>I guess 472</think> <answer>472</answer>", {}, 0),
        ("<think>I guess 471</think> <answer>472</answer>", {"part": "answer"}, 1),
        ("<think>I guess 472</think> <answer>471</answer>", {"part": "answer"}, 0),
        ("<think>I guess 471</think>472", {"part": "final"}, 1),
        ("472", {"part": "final"}, 1),  # no thinking: all of it is final
    ],
)
def test_a_part_of_it_may_be_compared(text: str, options: dict[str, Any], value: float) -> None:
    assert exact_match(completion(text), PROBLEM, **options).value == value


def test_case_may_be_ignored() -> None:
    street = Problem(id="p", prompt="", answer="Hauptstraße")
    assert exact_match(completion("HAUPTSTRASSE"), street, ignore_case=True).value == 1
    assert exact_match(completion("HAUPTSTRASSE"), street).value == 0


@pytest.mark.parametrize("text", ["472", "<think>472", "<think><answer>472</answer>"])
def test_a_missing_part_is_the_wrong_format(text: str) -> None:
    score = exact_match(completion(text), PROBLEM, part="answer")
    assert (score.value, score.outcome, score.detail) == (0.0, Outcome.wrong_format, "no answer part")


def test_a_part_that_does_not_exist_is_an_error() -> None:
    with pytest.raises(ValueError, match="part is 'reply'; it must be one of: all, think, final, answer"):
        exact_match.check_arguments(part="reply", strip=False, ignore_case=False)  # type: ignore[attr-defined]


def test_a_prefix_of_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="empty answer"):
        prefix_match(completion("4"), Problem(id="p", prompt="", answer=""))
