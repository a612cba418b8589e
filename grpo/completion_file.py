"""Completions in a JSON-lines file: rows read one at a time, bad ones named, and written back whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from grpo.rewards.runtime import Judgement
from grpo.types import Completion, FinishReason, Problem


@dataclass(frozen=True, slots=True, kw_only=True)
class Columns:
    """Where a row's parts stand. ``gold`` empty: the reward needs none. ``template``: score the gold answers, written so."""

    completion: str = "completion"
    gold: str = "gold"
    prompt: str = "prompt"
    template: str | None = None


@dataclass(slots=True, kw_only=True)
class Row:
    """A line of the file: what it holds, and what to score – or, in ``fault``, why it cannot be scored."""

    number: int
    size: int  # bytes
    data: dict[str, Any] | None = None
    completion: Completion | None = None
    problem: Problem | None = None
    fault: str = ""
    judged: Mapping[str, Judgement] = field(default_factory=dict)


def read_rows(path: Path, columns: Columns) -> Iterator[Row]:
    """Every line that is not blank."""
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield _row(number, line, columns)


def _row(number: int, line: bytes, columns: Columns) -> Row:
    row = Row(number=number, size=len(line))
    try:
        data = json.loads(line)
    except ValueError as error:  # not UTF-8, or not JSON
        row.fault = f"is not JSON: {error}"
        return row
    if not isinstance(data, dict):
        row.fault = f'is a {type(data).__name__}, not an object {{"key": value, …}}'
        return row
    row.data = data
    try:
        gold = _text(data, columns.gold) if columns.gold else ""
        text = _text(data, columns.completion) if columns.template is None else columns.template.replace("{}", gold)
        row.problem = Problem(id=str(number), prompt=str(data.get(columns.prompt, "")), answer=gold, columns=data)
        row.completion = _completion(data, str(number), text)
    except ValueError as error:
        row.fault = str(error)
    return row


def _text(data: Mapping[str, Any], key: str) -> str:
    if key not in data:
        raise ValueError(f"has no key {key!r}; it has: {', '.join(map(repr, data)) or 'none'}")
    value = data[key]
    if isinstance(value, int | float) and not isinstance(value, bool):
        return json.dumps(value)
    if not isinstance(value, str):
        raise ValueError(f"{key!r} is {json.dumps(value)[:80]}; it must be a text or a number")
    return value


def _completion(data: Mapping[str, Any], problem_id: str, text: str) -> Completion:
    """``token_ids`` and ``finish_reason`` are used where the row has them, for rewards that look at the length."""
    tokens, reason = data.get("token_ids", ()), data.get("finish_reason", "stop")
    if not isinstance(tokens, list | tuple) or not all(isinstance(token, int) for token in tokens):
        raise ValueError("'token_ids' is not a list of whole numbers")
    if reason not in list(FinishReason):
        raise ValueError(f"'finish_reason' is {reason!r}; it must be one of: {', '.join(FinishReason)}")
    return Completion(
        problem_id=problem_id,
        index=0,
        prompt_ids=(0,),  # no engine saw it
        token_ids=tuple(tokens),
        text=text,
        logprobs=(0.0,) * len(tokens),
        policy_versions=(0,) * len(tokens),
        finish_reason=FinishReason(reason),
    )


def chunks(rows: Iterator[Row], size: int) -> Iterator[list[Row]]:
    chunk: list[Row] = []
    for row in rows:
        chunk.append(row)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


@contextlib.contextmanager
def written(path: Path | None) -> Iterator[TextIO | None]:
    """The output, beside its place until it is whole: what stood there before is replaced at once, or not at all."""
    if path is None:
        yield None
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("w", encoding="utf-8") as out:
            yield out
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
