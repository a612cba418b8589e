"""Rewards for structured output."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from grpo.rewards.arguments import checked_by, flag, one_of
from grpo.rewards.text import PARTS, part_of
from grpo.types import Completion, Outcome, Problem, Score

_FENCE = re.compile(r"\s*```(?:json)?[ \t]*\n(?P<inside>.*)\n[ \t]*```\s*", re.DOTALL)


class _Fault(ValueError):
    """The text is not the JSON that is asked for."""


def _check(part: str, fenced: bool, keys: Sequence[str] | None, schema: Mapping[str, Any] | None) -> None:
    one_of("part", part, PARTS)
    flag("fenced", fenced)
    if keys is not None and (isinstance(keys, str) or not all(isinstance(key, str) for key in keys) or len(set(keys)) != len(keys)):
        raise ValueError(f"keys is {keys!r}; it must be a list of different names")
    if schema is not None:
        _check_schema(schema)


def _check_schema(schema: Any) -> None:
    if not isinstance(schema, Mapping):
        raise ValueError(f"schema is {schema!r}; it must be a JSON Schema, e.g. {{type: object}}")
    import jsonschema

    try:
        jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator).check_schema(schema)
    except jsonschema.SchemaError as error:
        raise ValueError(f"schema is no JSON Schema: at {error.json_path}, {error.message}") from error


@checked_by(_check)
def json_valid(
    completion: Completion,
    problem: Problem,
    part: str = "final",
    fenced: bool = True,
    keys: Sequence[str] | None = None,
    schema: Mapping[str, Any] | None = None,
) -> Score:
    """1 if the completion is valid JSON and nothing else, else 0 with outcome ``wrong_format``; the detail says why.

    JSON as in RFC 8259: no ``NaN`` or ``Infinity``, no comments, no comma before a bracket closes, and no name twice in one object.

    Args:
        part: what must be JSON: ``all`` of the text, what is ``final`` (after thinking), or the ``answer`` between its tags.
        fenced: it may stand in a fenced code block.
        keys: it must be an object with exactly these names.
        schema: a JSON Schema that it must satisfy. References are followed within the schema only.
    """
    _check(part, fenced, keys, schema)
    text = part_of(completion, problem, part)
    if text is None:
        return Score(value=0.0, outcome=Outcome.wrong_format, detail=f"no {part} part")
    fence = _FENCE.fullmatch(text) if fenced else None
    try:
        value = parse_json(fence["inside"] if fence else text)
        if keys is not None:
            _require_keys(value, keys)
        if schema is not None:
            _require_schema(value, schema)
    except _Fault as fault:
        return Score(value=0.0, outcome=Outcome.wrong_format, detail=str(fault))
    return Score(value=1.0)


json_valid.timeout_value = 0.0  # type: ignore[attr-defined]  # JSON that takes so long to check is the model's doing


def parse_json(text: str) -> Any:
    """
    Raises:
        ValueError: the text is not JSON as RFC 8259 has it, an object holds a name twice, or it is nested too deeply to read.
    """
    try:
        return json.loads(text, parse_constant=_no_constant, object_pairs_hook=_without_duplicates)
    except _Fault:
        raise
    except json.JSONDecodeError as error:
        raise _Fault(f"line {error.lineno}, column {error.colno}: {error.msg}") from error
    except RecursionError as error:
        raise _Fault("nested too deeply") from error
    except ValueError as error:  # an integer of more digits than Python reads
        raise _Fault(str(error)) from error


def _no_constant(name: str) -> NoReturn:
    raise _Fault(f"{name} is no JSON value")


def _without_duplicates(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise _Fault(f"the name {name!r} stands twice in one object")
        found[name] = value
    return found


def _require_keys(value: Any, keys: Sequence[str]) -> None:
    if not isinstance(value, dict):
        raise _Fault(f"is a {type(value).__name__}, not an object")
    if missing := sorted(set(keys) - set(value)):
        raise _Fault(f"lacks {', '.join(missing)}")
    if more := sorted(set(value) - set(keys)):
        raise _Fault(f"also has {', '.join(more)}")


def _require_schema(value: Any, schema: Mapping[str, Any]) -> None:
    import jsonschema
    import referencing

    kind = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
    validator = kind(schema, registry=referencing.Registry())  # an empty one: nothing is fetched from anywhere
    try:
        error = jsonschema.exceptions.best_match(validator.iter_errors(value))
    except RecursionError as deep:
        raise _Fault("nested too deeply") from deep
    if error is not None:
        raise _Fault(f"at {error.json_path}: {error.message}")
