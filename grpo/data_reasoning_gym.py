"""Tasks of reasoning-gym (https://github.com/open-thought/reasoning-gym), generated; ``grpo.rewards.reasoning_gym.score`` is their reward.

``data=reasoning_gym data.problems.task=chain_sum reward=reasoning_gym``. Needs ``grpo-toolkit[reasoning-gym]``.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import random
import subprocess
import sys
import tempfile
from typing import Any

from grpo.config import ConfigError
from grpo.data import Row
from grpo.imports import search_path
from grpo.rewards.reasoning_gym import COLUMN, NEEDED, dataset

HELDOUT_SEED = 20_250_122  # held-out problems are the same in every run
RUNS_PROGRAMS = "codeio"  # the task whose problems are programs out of a data set, run to see what they return
_RUNS = 8  # of such a program, each with the same result as the first
_TRIES = 10  # problems generated for each one wanted: small tasks repeat themselves


def reasoning_gym(split: str, *, task: str, seed: int = 0, size: int = 2000, heldout: int = 200, **settings: Any) -> list[Row]:
    """Problems of one task, no two alike, and no held-out one among those that are trained on; the same in every process.

    A row holds the problem's entry as the task generated it, which is what the task judges an answer by: a Python literal, since JSON
    would make lists of tuples. The few problems whose entry no literal says exactly are passed over.

    Args:
        task: its name in reasoning-gym, e.g. ``chain_sum`` or ``countdown``; or ``composite``, a mixture of the tasks in ``datasets``.
        size, heldout: problems of the two splits; fewer where the task has not so many.
        settings: those of the task, e.g. ``min_terms=2``.
    """
    for name, count in (("size", size), ("heldout", heldout)):
        if count < 1:
            remedy = "set it to 1 or more" + ("; eval.problems=0 does without evaluation" if name == "heldout" else "")
            raise ConfigError(f"data.problems.{name}", f"is {count}, but it counts problems", remedy)
    if importlib.util.find_spec("reasoning_gym") is None:
        raise ConfigError("data.problems.fn", "tasks of reasoning-gym need the package reasoning-gym", NEEDED)
    answer = _in_a_child({"split": split, "task": task, "seed": seed, "size": size, "heldout": heldout, "settings": settings})
    if "error" in answer:
        remedy = answer.get("remedy", "see reasoning_gym.factory.DATASETS")
        raise ConfigError("data.problems", f"task {task!r} with {settings}: {answer['error']}", remedy)
    rows: list[Row] = answer["rows"]
    return rows


# ---- in a process of its own -----------------------------------------------------------------------------------------
# Some tasks walk through sets of strings, whose order is another in every process unless PYTHONHASHSEED says otherwise; it must stand in
# the environment when Python starts. And a generator may seed numpy, print, or run programs from a data set: not in the trainer.


_CHILD = "import json, sys; from grpo.data_reasoning_gym import _answer; _answer(**json.load(sys.stdin))"


def _in_a_child(order: dict[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryFile() as written:  # not the child's stdout, where generators and sitecustomize print
        answer_to = written.fileno()
        try:
            said = json.dumps({"order": order, "answer_to": answer_to})
        except TypeError as error:
            return {"error": f"{error}; write it as text"}
        child = subprocess.run(
            [sys.executable, "-P", "-c", _CHILD],
            input=said,
            stdout=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "PYTHONHASHSEED": "0", "PYTHONPATH": search_path()},
            pass_fds=[answer_to],
        )
        written.seek(0)
        answer = written.read()
    if child.returncode or not answer:
        how = f"was ended by signal {-child.returncode}" if child.returncode < 0 else f"exited with code {child.returncode}"
        remedy = "what it wrote to stderr says why; if memory ran out: fewer problems, data.problems.size"
        return {"error": f"the process that generates the problems {how}", "remedy": remedy}
    answered: dict[str, Any] = json.loads(answer)
    return answered


def _answer(order: dict[str, Any], answer_to: int) -> None:
    try:
        answer: dict[str, Any] = {"rows": _split(**order)}
    except Exception as error:  # whatever a task makes of its settings: its message is for the user
        answer = {"error": f"{type(error).__name__}: {error}"}
    with open(answer_to, "w") as out:
        json.dump(answer, out)


def _split(split: str, task: str, seed: int, size: int, heldout: int, settings: dict[str, Any]) -> list[Row]:
    held_out = _rows("heldout", task, HELDOUT_SEED, heldout, settings, without=frozenset())
    if split == "heldout":
        return held_out
    return _rows("train", task, seed, size, settings, without=frozenset(row["question"] for row in held_out))


def _rows(split: str, task: str, seed: int, wanted: int, settings: dict[str, Any], without: frozenset[str]) -> list[Row]:
    recipe = {**settings, "seed": seed, "size": _TRIES * wanted}
    rows: dict[str, Row] = {}
    generated = dataset(task, recipe)
    unsaid = None
    for index in range(len(generated)):
        if len(rows) == wanted:
            break
        entry = _entry(generated, index)
        question = str(entry["question"])
        if question in without or question in rows:
            continue
        literal = repr(entry)
        if not _says(literal, entry):
            unsaid = literal
            continue
        if entry["metadata"].get("source_dataset") == RUNS_PROGRAMS and any(_entry(generated, index) != entry for _ in range(_RUNS)):
            continue  # the program looks at the clock, or draws numbers that no seed fixes: nobody can say what it returns
        answer = "" if entry["answer"] is None else str(entry["answer"])
        made_by = {"task": task, "settings": recipe, "entry": literal}
        rows[question] = {"id": f"{task}/{split}/{index}", "question": question, "answer": answer, COLUMN: made_by}
    if unsaid and not rows:
        raise ValueError(f"its entries hold what no Python literal says, and so cannot be stored: {unsaid:.500}")
    return list(rows.values())


def _entry(generated: Any, index: int) -> Any:
    """What the task generates, as a function of ``index`` even where it draws from the generators that all of a process share."""
    import numpy as np

    random.seed(index)
    np.random.seed(index)
    return _plain(generated[index])


def _plain(value: Any) -> Any:
    """Numpy's numbers and strings as Python's own, of which there are literals."""
    import numpy as np

    if type(value) is dict:
        return {_plain(key): _plain(each) for key, each in value.items()}
    if type(value) in (list, tuple, set):
        return type(value)(map(_plain, value))
    return value.item() if isinstance(value, np.generic) else value


def _says(literal: str, entry: Any) -> bool:
    try:
        return bool(ast.literal_eval(literal) == entry)
    except (ValueError, SyntaxError, RecursionError):
        return False
