"""The reward of verifiers' tasks (https://github.com/PrimeIntellect-ai/verifiers): the task scores the conversation itself.

Works for tasks that are one question and one reply, judged by the conversation alone. Tasks that need more – a container, tool
servers, hooks around the conversation – are refused by ``check_task``: verifiers runs those itself, in
``grpo.rollouts.verifiers_episodes``.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from grpo.rewards.arguments import checked_by
from grpo.rewards.text import begins_in_thought, final_part
from grpo.types import Completion, Problem, Score

NEEDED = "pip install 'grpo-toolkit[verifiers]'"
COLUMN = "verifiers"  # of a problem: its taskset, the taskset's settings, and the task's data


def _check() -> None:
    if importlib.util.find_spec("verifiers") is None:
        raise ImportError(f"this reward needs the package verifiers: {NEEDED}")


@checked_by(_check)
async def score(completion: Completion, problem: Problem) -> Score:
    """The weighted sum of the task's rewards; each of them, and its metrics, in the detail.

    Thought before ``</think>`` is the reply's reasoning, what follows it its content, as a server with a reasoning parser hands them over.
    """
    _check()
    task = task_of(problem)
    if reason := check_task(task):
        raise ValueError(f"{reason}; with environment=verifiers the task itself judges, and reward=verifiers is left out")
    trace = _trace(task, completion, problem)
    await task.score(trace)
    said = {name: None if reward is None else reward.score for name, reward in trace.rewards.items()} | dict(trace.metrics)
    return Score(value=float(trace.reward), detail=", ".join(f"{name} {value}" for name, value in said.items()))


def task_of(problem: Problem) -> Any:
    """The task that the problem is.

    Raises:
        ValueError: it is none of verifiers'.
    """
    made_by = problem.columns.get(COLUMN)
    if not isinstance(made_by, Mapping):
        raise ValueError(f"problem {problem.id!r} has no column {COLUMN!r}; take the data from grpo.data_verifiers.verifiers_tasks")
    found = taskset(made_by["taskset"], made_by["settings"])
    kind = type(found).task_type()
    return kind(kind.data_type().model_validate(made_by["task"]), found.config.task)


def roles_of(name: str) -> tuple[str, ...]:
    """What a taskset calls the agents that act in a rollout of it."""
    from verifiers.v1 import AgentConfig
    from verifiers.v1.utils.loaders import env_config_type

    return tuple(role for role, field in env_config_type(name).model_fields.items() if isinstance(field.default, AgentConfig))


def has_own_env(name: str) -> bool:
    """Whether a taskset says itself how a rollout goes, and judges it."""
    from verifiers.v1.envs.single_agent import SingleAgentEnv
    from verifiers.v1.utils.loaders import environment_class

    return environment_class(name) is not SingleAgentEnv


def taskset(name: str, settings: Mapping[str, Any]) -> Any:
    """An installed taskset by its id, with its settings.

    Raises:
        ImportError: verifiers, or the taskset's package, is not installed.
        ValueError: a setting that the taskset does not have (pydantic's).
    """
    return _taskset(name, json.dumps(settings, sort_keys=True))


@lru_cache(16)
def _taskset(name: str, settings: str) -> Any:
    try:
        from verifiers.v1.utils import loaders
    except ImportError as error:
        raise ImportError(f"tasksets of verifiers need the package: {error}") from error
    return loaders.load_taskset(loaders.taskset_config_type(name).model_validate({**json.loads(settings), "id": name}))


def check_task(task: Any) -> str | None:
    """Why a task cannot be scored by the conversation alone; None if it can."""
    from verifiers.v1 import Task

    kind = type(task)
    if kind.NEEDS_CONTAINER:
        return "it needs a container"
    if kind.toolsets(task.config):
        return "it has tool servers"
    if changed := [name for name in ("setup", "finalize", "stage_verifier") if getattr(kind, name) is not getattr(Task, name)]:
        return f"its {changed[0]} prepares a runtime"
    needs = [fn.__name__ for kind_of in ("reward", "metric") for fn in task.hooks(kind_of) if _needs_runtime(fn)]
    needs += [judge.reward_name for judge in task.plugged_judges() if _needs_runtime(judge.score)]
    return f"{needs[0]} looks into its runtime" if needs else None


def _needs_runtime(function: Any) -> bool:
    parameter = inspect.signature(function).parameters.get("runtime")
    return parameter is not None and parameter.default is inspect.Parameter.empty


def parts_of(text: str, opened: bool) -> tuple[str, str]:
    """The thought before ``</think>`` and what is said behind it. ``opened``: the text begins inside a thought."""
    final = final_part(text, opened)
    thought = text if final is None else text.removesuffix(final)
    return thought.removesuffix("</think>").strip().removeprefix("<think>").strip(), final or ""


def _trace(task: Any, completion: Completion, problem: Problem) -> Any:
    """The conversation as verifiers would have recorded it."""
    import verifiers.v1 as vf
    from verifiers.v1.graph import MessageNode
    from verifiers.v1.state import state_cls
    from verifiers.v1.trace import AgentInfo, ModelCall, Trace, TraceTask

    data = task.data
    asked = [vf.UserMessage(content=data.prompt)] if isinstance(data.prompt, str) else list(data.prompt or [])
    system = [vf.SystemMessage(content=data.system_prompt)] if data.system_prompt else []
    thought, said = parts_of(completion.text, begins_in_thought(problem))
    reply = vf.AssistantMessage(content=said, reasoning_content=thought or None)
    messages = [*system, *asked, reply]
    nodes = [
        MessageNode(parent=i - 1 if i else None, message=message, sampled=message is reply) for i, message in enumerate(messages)
    ]
    return Trace(
        task=TraceTask(type=type(task).__name__, data=data, key=task.key, hash=task.hash),
        state=state_cls(type(task))(),
        agent=AgentInfo(config=vf.AgentConfig()),
        nodes=nodes,
        calls=[ModelCall(node=len(nodes) - 1, finish_reason=str(completion.finish_reason))],
        is_completed=True,
        ok=True,
    )


def _warm_up(**settings: Any) -> None:
    importlib.import_module("verifiers.v1")  # takes seconds


score.warm_up = _warm_up  # type: ignore[attr-defined]
# Mostly waiting, if for anything: a judge of verifiers' own is a model somewhere.
score.limits = {"wall_s": 120.0}  # type: ignore[attr-defined]
