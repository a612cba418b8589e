"""Rewards that compare character by character."""

from __future__ import annotations

import pytest

from grpo.rewards.match import exact_match, prefix_match
from grpo.types import Completion, FinishReason, Problem


def completion(text: str) -> Completion:
    return Completion(
        problem_id="p", index=0, prompt_ids=(1,), token_ids=(), text=text, logprobs=(), policy_versions=(), finish_reason=FinishReason.stop
    )


PROBLEM = Problem(id="p", prompt="", answer="472")


@pytest.mark.parametrize(
    ("text", "exact", "prefix"), [("472", 1, 1), ("472abc", 0, 1), ("479", 0, 2 / 3), ("972", 0, 0), (" 472", 0, 0), ("", 0, 0)]
)
def test_matches(text: str, exact: float, prefix: float) -> None:
    assert exact_match(completion(text), PROBLEM) == exact
    assert prefix_match(completion(text), PROBLEM) == pytest.approx(prefix)


def test_a_prefix_of_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="empty answer"):
        prefix_match(completion("4"), Problem(id="p", prompt="", answer=""))
