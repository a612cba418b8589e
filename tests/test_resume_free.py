"""Resume where the bits are not promised: engines that share out the work as it comes, and sampling ahead of training.

Which completion turns out how depends on the clock there. What does not: every group that was drawn is counted once, in one step.
"""

from __future__ import annotations

import random
import shutil
from collections import Counter
from collections.abc import Sequence
from itertools import chain

import pytest

from grpo import checkpoint
from grpo.data import ProblemSource
from grpo.plan import load_both_splits, plan
from grpo.recipe import load_run
from grpo.run import RunFolder

from .killable_runs import Kill
from .workshop import SAVED_EVERY, STEPS, Workshop, name_of

AHEAD = ("rollout.max_staleness=1",)
DYNAMIC = ("rollout.sampling_rounds=3", "rollout.completions_per_problem=2", "rollout.max_new_tokens=3")  # most groups have no signal


def random_moments(seed: str, generation: str, count: int) -> list[Kill]:
    """So many of each phase, at any time of the run: before its first checkpoint, between two, behind the last but one."""
    chance = random.Random(seed)
    phases = {generation: STEPS, "update": STEPS, "sync": STEPS, "checkpoint": STEPS // SAVED_EVERY, "row": STEPS}
    drawn = [[Kill(phase=p, call=chance.randint(1, calls), share=chance.random()) for _ in range(count)] for p, calls in phases.items()]
    return list(chain.from_iterable(drawn))


def each_once(run: RunFolder) -> list[int]:
    """Every group that was drawn is in one step, whole, and no problem of the data's order is left out: the groups of each step."""
    config = load_run(run.path, [])
    assert [row["step"] for row in run.read_metrics()] == list(range(STEPS + 1))
    assert run.rollout_steps() == list(range(1, STEPS + 1)) and checkpoint.steps(run)[-1] == STEPS
    drawn = []
    for step in run.rollout_steps():
        rollouts = Counter((row["problem_id"], row["index"]) for row in run.read_rollouts(step).to_pylist())
        drawn.append({problem for problem, _ in rollouts})
        assert rollouts == {(problem, index): 1 for problem in drawn[-1] for index in range(config.rollout.completions_per_problem)}
    train_problems, _ = load_both_splits(plan(config))
    order = iter(ProblemSource(train_problems, config.run.seed).take(sum(map(len, drawn))))
    assert drawn == [{next(order).id for _ in problems} for problems in drawn]
    return list(map(len, drawn))


def survives(workshop: Workshop, kill: Kill, *words: str, pool: int = 0) -> list[int]:
    """The groups of each step of a run that was killed and gone on with; see ``each_once``."""
    name = "killed"
    shutil.rmtree(workshop.path(name), ignore_errors=True)
    assert workshop.runs.run("train", str(workshop.recipe), f"run.name={name}", *words, kill=kill, pool=pool) == -9, workshop.said()
    assert workshop.runs.run("train", str(workshop.path(name)), pool=pool) == 0, workshop.said()
    return each_once(RunFolder.open(workshop.path(name)))


@pytest.mark.slow
@pytest.mark.parametrize("kill", random_moments("ahead", "generation/ahead", 1), ids=name_of)
def test_ahead_of_training(workshop: Workshop, kill: Kill) -> None:
    assert survives(workshop, kill, *AHEAD) == [2] * STEPS


@pytest.mark.slow
@pytest.mark.parametrize("kill", random_moments("dynamic", "generation/ahead", 1)[:2], ids=name_of)
def test_with_groups_that_are_replaced(workshop: Workshop, kill: Kill) -> None:
    groups = survives(workshop, kill, *AHEAD, *DYNAMIC)
    assert sum(groups) > 2 * STEPS, "groups without signal were replaced"


@pytest.mark.slow
@pytest.mark.parametrize("words", [(), pytest.param(AHEAD, marks=pytest.mark.full)], ids=["on-policy", "ahead"])
def test_in_a_pool(workshop: Workshop, words: Sequence[str]) -> None:
    assert survives(workshop, Kill(phase="update", call=4, share=0.5), *words, pool=2) == [2] * STEPS


@pytest.mark.full
@pytest.mark.parametrize("words", [AHEAD, (*AHEAD, *DYNAMIC)], ids=["ahead", "ahead and dynamic"])
@pytest.mark.parametrize("kill", random_moments("often", "generation/ahead", 4), ids=name_of)
def test_killed_at_random(workshop: Workshop, kill: Kill, words: Sequence[str]) -> None:
    survives(workshop, kill, *words)
