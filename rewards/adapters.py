"""Reward functions in the styles of other toolkits → ours: ``(completion, problem) -> Score`` or, for TRL's, the batch form.

A function is called as its own toolkit calls it – the same arguments, by the same names – so that it needs no change. What it
says beside the score (``extra_logs``, ``log_extra``, the other keys of a dict) goes into the score's detail.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, TypeGuard

from grpo.rewards.base import call, call_batch, to_score, to_scores
from grpo.rewards.styles import Style
from grpo.types import Completion, Outcome, Problem, Score

Scorer = Callable[[Sequence[Completion], Sequence[Problem]], list[Score]]  # never raises

_NOT_COLUMNS = ("prompt", "completion", "completion_ids")  # TRL passes these under their plural names


def scorer(function: Callable[..., Any], style: Style, columns: Mapping[str, str] | None = None) -> Scorer:
    """One way to call them all: a list of completions in, a score for each out.

    Args:
        function: as its author wrote it, its configured arguments fixed.
        style: how it wants to be called.
        columns: for TRL's styles, argument → column of the data, where the names differ.
    """
    adapted = _adapt(function, style, columns or {})
    if style.whole_batch:
        return functools.partial(call_batch, adapted)
    return lambda completions, problems: [call(adapted, c, p) for c, p in zip(completions, problems, strict=True)]


def _adapt(function: Callable[..., Any], style: Style, columns: Mapping[str, str]) -> Callable[..., Any]:
    adapted: Callable[..., Any]
    if style.is_trl:
        adapted = functools.partial(_call_trl, function, style, columns)
    elif style in _ADAPTERS:
        adapted = functools.partial(_ADAPTERS[style], function)
    else:
        return function

    @functools.wraps(getattr(function, "func", function))  # the attributes that it carries for the runtime
    def called(first: Any, second: Any) -> Any:
        return adapted(first, second)

    return called


def _then(value: Any, read: Callable[[Any], Any]) -> Any:
    """``read`` of what a function returned, or of what it will have returned if it is asynchronous."""
    if not inspect.isawaitable(value):
        return read(value)

    async def later(awaitable: Awaitable[Any]) -> Any:
        return read(await awaitable)

    return later(value)


# ---- f(gold, completion) -------------------------------------------------------------------------------------------------------


def _call_grader(function: Callable[..., Any], completion: Completion, problem: Problem) -> Any:
    return function(problem.answer, completion.text)


# ---- verl ----------------------------------------------------------------------------------------------------------------------


def _call_verl(function: Callable[..., Any], completion: Completion, problem: Problem) -> Any:
    """Columns as verl's data has them: ``data_source``, ``reward_model.ground_truth``, ``extra_info``; else what we know."""
    model = problem.columns.get("reward_model")
    value = function(
        data_source=problem.columns.get("data_source", ""),
        solution_str=completion.text,
        ground_truth=model["ground_truth"] if isinstance(model, Mapping) and "ground_truth" in model else problem.answer,
        extra_info=problem.columns.get("extra_info", {}),
    )
    return _then(value, lambda result: _from_mapping(result, key="score"))


# ---- OpenRLHF ------------------------------------------------------------------------------------------------------------------


def _call_openrlhf(function: Callable[..., Any], completion: Completion, problem: Problem) -> Any:
    """A batch of one; a query is the prompt and the response in one text."""
    value = function([problem.prompt + completion.text], [problem.prompt], [problem.answer])
    return _then(value, lambda result: _from_mapping(result, key="rewards", only=_single))


def _single(value: Any) -> Any:
    """The one element of a batch of one; anything else is handed on, for its type to be reported."""
    if getattr(value, "shape", ()) and hasattr(value, "tolist"):
        value = value.tolist()
    return value[0] if isinstance(value, list | tuple) and len(value) == 1 else value


def _from_mapping(result: Any, key: str, only: Callable[[Any], Any] = lambda value: value) -> Score:
    """``{key: score, …}`` or the score alone; what else the mapping says is the detail."""
    if not isinstance(result, Mapping):
        return to_score(only(result))
    if key not in result:
        return Score(value=float("nan"), outcome=Outcome.invalid, detail=f"returned {dict(result)!r}, without the key {key!r}")
    score = to_score(only(result[key]))
    extra = dict(result.get("extra_logs", {})) if key == "rewards" else {n: v for n, v in result.items() if n != key}
    return _with_detail(score, {name: only(value) for name, value in extra.items()})


_ADAPTERS = {Style.grader: _call_grader, Style.verl: _call_verl, Style.openrlhf: _call_openrlhf}


# ---- TRL -----------------------------------------------------------------------------------------------------------------------


def _call_trl(
    function: Callable[..., Any], style: Style, columns: Mapping[str, str], completions: Sequence[Completion], problems: Sequence[Problem]
) -> Any:
    """As ``GRPOTrainer`` does: everything by name, each column of the data as a list with one entry a completion.

    Messages instead of texts where the data's ``prompt`` is a list of messages (TRL's own rule), or the style says so.
    """
    logged: dict[str, list[Any]] = {}
    names = dict.fromkeys(name for problem in problems for name in problem.columns if name not in _NOT_COLUMNS)
    arguments: dict[str, Any] = {name: [problem.columns.get(name) for problem in problems] for name in names}
    for argument, column in columns.items():
        if not all(column in problem.columns for problem in problems):
            raise KeyError(f"columns: {argument} is to be the column {column!r}, which the data does not have; it has: {', '.join(names)}")
        arguments[argument] = [problem.columns[column] for problem in problems]
    chat = style is Style.trl_chat or all(_is_messages(problem.columns.get("prompt")) for problem in problems)
    arguments |= {
        "prompts": [_messages(problem) if chat else problem.prompt for problem in problems],
        "completions": [[{"role": "assistant", "content": c.text}] if chat else c.text for c in completions],
        "completion_ids": [list(completion.sampled_ids) for completion in completions],
        "log_extra": lambda name, values: logged.__setitem__(name, list(values)),
    }
    value = function(**_accepted(function, arguments))
    return _then(value, lambda result: _with_logged(to_scores(result, len(completions)), logged))


def _is_messages(prompt: Any) -> TypeGuard[Sequence[Mapping[str, Any]]]:
    return isinstance(prompt, list | tuple) and bool(prompt) and all(isinstance(m, Mapping) and "role" in m for m in prompt)


def _messages(problem: Problem) -> list[dict[str, Any]]:
    prompt = problem.columns.get("prompt")
    return [dict(message) for message in prompt] if _is_messages(prompt) else [{"role": "user", "content": problem.prompt}]


def _accepted(function: Callable[..., Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What the function takes: everything if it has ``**kwargs``, as TRL asks for; else what it names."""
    parameters = inspect.signature(function).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return dict(arguments)
    return {name: value for name, value in arguments.items() if name in parameters}


def _with_logged(scores: list[Score], logged: Mapping[str, Sequence[Any]]) -> list[Score]:
    """What the function told ``log_extra``, one value a completion, as details."""
    whole = {name: values for name, values in logged.items() if len(values) == len(scores)}
    return [_with_detail(score, {name: values[i] for name, values in whole.items()}) for i, score in enumerate(scores)]


def _with_detail(score: Score, said: Mapping[str, Any]) -> Score:
    if not said or score.detail:
        return score
    return to_score(Score(value=score.value, outcome=score.outcome, detail="\n".join(f"{name}: {value}" for name, value in said.items())))
