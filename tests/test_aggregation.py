"""Aggregations of token losses: golden values with their arithmetic."""

from __future__ import annotations

import pytest

from .small_batches import AGGREGATIONS, LENGTH, make_batch, tensor


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("token_mean", 21 / 6),  # (1 + 2 + 3 + 4 + 5 + 6) / 6
        ("sequence_mean", (2 + 4 + 11 / 2) / 3),  # means of (1 2 3), (4), (5 6)
        ("constant_length", 21 / (3 * LENGTH)),
        ("group_mean", (10 / 4 + 11 / 2) / 2),  # (1 2 3 4) and (5 6)
        ("sequence_sum", 21 / 3),
    ],
)
def test_aggregation_golden(name: str, expected: float) -> None:
    batch = make_batch([[3, 1], [2]])
    assert float(AGGREGATIONS[name](tensor(1, 2, 3, 4, 5, 6), batch)) == pytest.approx(expected)


def test_constant_length_does_not_care_how_long_completions_are() -> None:
    """Dr. GRPO's point: the same sum over tokens weighs the same, however many tokens there are."""
    short, long = make_batch([[1, 1]]), make_batch([[1, 5]])
    one, other = (AGGREGATIONS["constant_length"](v, b) for v, b in ((tensor(3, 2), short), (tensor(3, 1, 1, 0, 0, 0), long)))
    assert float(one) == pytest.approx(float(other)) == pytest.approx(5 / (2 * LENGTH))
