"""Dynamic sampling: nothing is trained on twice, nothing with signal is thrown away, all that was drawn is accounted for."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from grpo import advantages
from grpo.batch import collate
from grpo.data import ProblemSource
from grpo.metrics import has_signal
from grpo.rollouts.dynamic import draw_groups
from grpo.toy import toy_group
from grpo.types import Group, Problem


@given(
    mixed=st.lists(st.booleans(), min_size=4, max_size=30),
    wanted=st.integers(1, 4),
    rounds=st.integers(1, 6),
    seed=st.integers(0, 99),
    start=st.integers(0, 60),
)
def test_what_is_drawn_is_kept_or_dropped_once(mixed: list[bool], wanted: int, rounds: int, seed: int, start: int) -> None:
    """In a step that begins anywhere in the data: an epoch may end before it, in it, or in one of its further rounds."""
    problems = [Problem(id=f"p{i}", prompt="?", answer="1") for i in range(len(mixed))]
    signal = dict(zip([p.id for p in problems], mixed, strict=True))
    calls: list[list[str]] = []

    def collect(asked: Sequence[Problem]) -> list[Group]:
        calls.append([p.id for p in asked])
        return [toy_group(p.id, [0, 1] if signal[p.id] else [1, 1], [1, 1]) for p in asked]

    source, straight = ProblemSource(problems, seed), ProblemSource(problems, seed)
    source.position = straight.position = start
    drawn = draw_groups(collect, source.take, has_signal, wanted, rounds)
    ids = [g.problem.id for g in drawn.all]
    assert sorted(ids) == sorted(p for call in calls for p in call) and len(set(ids)) == len(ids)
    assert len(drawn.kept) <= wanted and len(calls) <= rounds
    assert not any(has_signal(g) for g in drawn.dropped), "nothing with signal is thrown away"
    if rounds == 1:
        assert len(drawn.kept) == wanted and not drawn.dropped
    if len(calls) < rounds and len(drawn.kept) < wanted:
        assert set(ids) == set(signal), "it stopped because the data had no more"
    passed: list[str] = []  # the data in order, one by one, from the start of the step to where it has brought the source
    while straight.position < source.position:
        passed += [problem.id for problem in straight.take(1)]
    assert list(dict.fromkeys(passed)) == [problem for call in calls for problem in call], "in order, and only repetitions are passed over"
    without = [g for g in drawn.kept if not has_signal(g)]
    assert not without or len(calls) == rounds, "only what the last round gave is kept without signal"


@given(st.lists(st.tuples(st.sampled_from([0.0, 1.0, float("nan")]), st.integers(0, 2)), min_size=1, max_size=4))
def test_a_group_has_signal_exactly_if_it_is_given_an_advantage(rollouts: list[tuple[float, int]]) -> None:
    """Completions that could not be scored, and those without a token of the policy, are left out of both."""
    rewards, lengths = zip(*rollouts, strict=True)
    group = toy_group("g", rewards, lengths)
    batch = collate([group]).with_advantages(advantages.center)
    assert batch.advantages is not None
    assert has_signal(group) is bool((batch.advantages != 0).any())
