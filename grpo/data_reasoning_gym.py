"""Tasks of reasoning-gym (https://github.com/open-thought/reasoning-gym), generated; ``grpo.rewards.reasoning_gym.score`` is their reward.

``data=reasoning_gym data.problems.task=chain_sum reward=reasoning_gym``. Needs ``grpo-toolkit[reasoning-gym]``.
"""

from __future__ import annotations

from typing import Any

from grpo.config import ConfigError
from grpo.data import Row
from grpo.rewards.reasoning_gym import NEEDED, dataset

HELDOUT_SEED = 20_250_122  # held-out problems are the same in every run
_TRIES = 10  # problems generated for each one wanted: small tasks repeat themselves


def reasoning_gym(split: str, *, task: str, seed: int = 0, size: int = 2000, heldout: int = 200, **settings: Any) -> list[Row]:
    """Problems of one task, no two alike, and no held-out one among those that are trained on.

    A row holds how to generate its problem again, from which the reward has it: what a task's own judgement needs may be more than
    text and numbers.

    Args:
        task: its name in reasoning-gym, e.g. ``chain_sum`` or ``countdown``.
        size, heldout: problems of the two splits; fewer where the task has not so many.
        settings: those of the task, e.g. ``min_terms=2``.
    """
    try:
        held_out = _rows("heldout", task, HELDOUT_SEED, heldout, settings, without=frozenset())
        if split == "heldout":
            return held_out
        return _rows("train", task, seed, size, settings, without=frozenset(row["question"] for row in held_out))
    except ImportError as error:
        raise ConfigError("data.problems.fn", f"{error}", NEEDED) from error
    except (ValueError, TypeError, AssertionError) as error:  # as reasoning-gym reports an unknown task or setting
        raise ConfigError("data.problems", f"task {task!r} with {settings}: {error}", "see reasoning_gym.factory.DATASETS") from error


def _rows(split: str, task: str, seed: int, wanted: int, settings: dict[str, Any], without: frozenset[str]) -> list[Row]:
    recipe = {**settings, "seed": seed, "size": _TRIES * wanted}
    rows: dict[str, Row] = {}
    generated = dataset(task, recipe)
    for index in range(len(generated)):
        if len(rows) == wanted:
            break
        entry = generated[index]
        question = str(entry["question"])
        if question not in without:
            answer = "" if entry["answer"] is None else str(entry["answer"])
            made_by = {"task": task, "settings": recipe, "index": index}
            rows.setdefault(question, {"id": f"{task}/{split}/{index}", "question": question, "answer": answer, "reasoning_gym": made_by})
    return list(rows.values())
