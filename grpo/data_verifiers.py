"""Tasks of verifiers (https://github.com/PrimeIntellect-ai/verifiers), 0.4 and later, with the taskset's package installed.

``data=verifiers data.problems.taskset=NAME`` and ``reward=verifiers`` for tasks of one question and one reply, or ``environment=verifiers``
for any: then verifiers runs the rollout, and the task judges it. Needs ``grpo-toolkit[verifiers]``.
"""

from __future__ import annotations

import itertools
import random
from typing import Any

from grpo.config import ConfigError
from grpo.data import Row
from grpo.rewards.verifiers import COLUMN, NEEDED, check_task, has_own_env, roles_of, taskset


def verifiers_tasks(
    split: str, *, taskset: str, seed: int = 0, size: int = 2000, heldout: int = 200, in_environment: bool = False, **settings: Any
) -> list[Row]:
    """The first ``size`` + ``heldout`` tasks of a taskset, ``heldout`` of them, the same in every run, held out.

    A row's ``question`` is the task's prompt as text, behind its system prompt if it has one; ``answer`` is its data's, if it has one.

    Args:
        taskset: its id, as ``verifiers`` takes it.
        in_environment: verifiers runs the rollouts; ``environment=verifiers`` sets it. Otherwise tasks that need that are refused.
        settings: of the taskset's own configuration.
    """
    try:
        tasks = list(itertools.islice(_taskset(taskset, settings), size + heldout))
        reasons = [reason for task in tasks[:1] if (reason := check_task(task))] + ["it has an Env of its own"] * has_own_env(taskset)
        roles = roles_of(taskset)
    except ImportError as error:
        raise ConfigError("data.problems.taskset", f"{taskset!r}: {error}", f"install its package; {NEEDED}") from error
    except (ValueError, TypeError, AttributeError) as error:  # as verifiers reports a wrong setting, or a package that is no taskset
        raise ConfigError("data.problems", f"taskset {taskset!r} with {settings}: {error}", "correct its settings") from error
    if in_environment and len(roles) != 1:
        what = f"several agents act in a rollout of {taskset!r} ({', '.join(roles)}), and there is one policy"
        raise ConfigError("data.problems.taskset", what, "choose a taskset with one agent")
    if reasons and not in_environment:
        raise ConfigError(
            "data.problems.taskset",
            f"tasks of {taskset!r} cannot be scored by the conversation alone: {reasons[0]}",
            "let verifiers run them: environment=verifiers reward={}",
        )
    random.Random(f"verifiers/{taskset}").shuffle(tasks)
    held_out = {_question(task) for task in tasks[:heldout]}
    chosen = tasks[:heldout] if split == "heldout" else [task for task in tasks[heldout:] if _question(task) not in held_out]
    return [_row(task, taskset, settings, split) for task in chosen]


_taskset = taskset  # the argument of that name hides it above


def _question(task: Any) -> str:
    return "\n\n".join(filter(None, (task.data.system_prompt, task.data.prompt_text)))


def _row(task: Any, taskset: str, settings: dict[str, Any], split: str) -> Row:
    return {
        "id": f"{taskset}/{split}/{task.data.idx}",
        "question": _question(task),
        "answer": str(getattr(task.data, "answer", "")),
        COLUMN: {"taskset": taskset, "settings": settings, "task": task.data.model_dump(mode="json")},
    }
