"""What README.md shows is what one sees."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from grpo.build import dry_run
from grpo.cli import main
from grpo.recipe import load_recipe
from grpo.rewards.format import r1_format
from grpo.run import RunFolder
from grpo.toy import toy_rollout
from grpo.types import Group, Problem


def test_the_objective_is_printed_as_it_stands_there(repository: Path) -> None:
    readme = (repository / "README.md").read_text(encoding="utf-8")
    sample = re.search(r"(?s)\$ grpo train r1_zero_arithmetic (\S+) --dry-run\n(.*?)…\n", readme)
    assert sample and len(sample[2].splitlines()) > 5
    assert dry_run(load_recipe("r1_zero_arithmetic", sample[1])).startswith(sample[2])


def test_the_reward_of_the_replay_tells_right_answers_apart(
    repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On what r1_zero_arithmetic samples: a right answer, a wrong one, one without the format."""
    readme = (repository / "README.md").read_text(encoding="utf-8")
    line = re.search(r"(?m)^grpo replay runs/r1_zero_arithmetic/slow --reward (\S+)", readme)
    assert line
    problem = Problem(id="train/8", prompt="2 + 6 + 9?", answer="17")
    texts = ["<think>2 + 6 = 8. 8 + 9 = 17.</think> <answer>17</answer>", "<think>It is 18.</think> <answer>18</answer>", "no idea"]
    rollouts = tuple(toy_rollout(problem, i, (1,), (1,), text=text) for i, text in enumerate(texts))
    assert r1_format(rollouts[0].completion, problem).value == 1
    run = RunFolder.create(tmp_path, "r1_zero_arithmetic", "slow")
    from grpo.build import plain
    from grpo.config_file import dump

    run.write_config(dump(plain(load_recipe("r1_zero_arithmetic"))))
    run.write_rollouts(1, [Group(problem=problem, rollouts=rollouts)])
    assert main(["replay", str(run.path), "--reward", line[1]]) == 0
    assert "mean reward            0 → 0.3333\n" in capsys.readouterr().out, "one of three is right"
