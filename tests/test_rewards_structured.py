"""The JSON reward."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo.rewards.structured import json_valid
from grpo.types import Completion, FinishReason, Outcome, Problem, Score

PROBLEM = Problem(id="p", prompt="Give JSON.", answer="")
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"$ref": "#/$defs/age"}},
    "required": ["name"],
    "$defs": {"age": {"type": "integer", "minimum": 0}},
}


def score(text: str, **arguments: Any) -> Score:
    completion = Completion(
        problem_id="p", index=0, prompt_ids=(1,), token_ids=(), text=text, logprobs=(), policy_versions=(), finish_reason=FinishReason.stop
    )
    return json_valid(completion, PROBLEM, **arguments)


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        ('{"a": [1, 2.5e3, null, true, "\\u00e9"]}', {}),
        ("  [] \n", {}),
        ("3", {}),
        ("<think>{not json}</think>\n{}", {}),
        ("```json\n{}\n```", {}),
        ("```\n[1]\n```\n", {}),
        ("<think>a</think> <answer>{}</answer>", {"part": "answer"}),
        ('{"b": 1, "a": 2}', {"keys": ["a", "b"]}),
        ("{}", {"keys": []}),
        ('{"name": "Ada", "age": 36}', {"schema": SCHEMA}),
        ('{"inner": {"x": 1}, "x": 2}', {}),  # the same name in two objects
    ],
)
def test_valid(text: str, arguments: dict[str, Any]) -> None:
    assert score(text, **arguments) == Score(value=1.0)


@pytest.mark.parametrize(
    ("text", "arguments", "why"),
    [
        ("", {}, "line 1, column 1: Expecting value"),
        ("{", {}, "line 1, column 2"),
        ("{} {}", {}, "Extra data"),
        ("Here it is: {}", {}, "Expecting value"),
        ("{'a': 1}", {}, "Expecting property name enclosed in double quotes"),
        ('{"a": 1,}', {}, "trailing comma|Expecting property name"),
        ("[1, NaN]", {}, "NaN is no JSON value"),
        ("[-Infinity]", {}, "-Infinity is no JSON value"),
        ('{"a": 1, "b": 2, "a": 1}', {}, "the name 'a' stands twice in one object"),
        ('{"x": {"\\u0061": 1, "a": 2}}', {}, "the name 'a' stands twice in one object"),
        ("// a comment\n{}", {}, "Expecting value"),
        ("```json\n{}\n```", {"fenced": False}, "Expecting value"),
        ("```json\n{}\n```\nDone.", {}, "Expecting value"),
        ("[" * 100_000, {}, "nested too deeply"),
        ("1" * 5_000, {}, "4300"),  # Python's limit for text → int
        ('{"a": 1}', {"keys": ["a", "b"]}, "lacks b"),
        ('{"a": 1, "c": 1}', {"keys": ["a"]}, "also has c"),
        ("[]", {"keys": ["a"]}, "is a list, not an object"),
        ('{"age": 3}', {"schema": SCHEMA}, r"at \$: 'name' is a required property"),
        ('{"name": "Ada", "age": -1}', {"schema": SCHEMA}, r"at \$.age: -1 is less than the minimum of 0"),
        ("{}", {"part": "answer"}, "no answer part"),
        ("<think>{}", {}, "no final part"),
    ],
)
def test_invalid(text: str, arguments: dict[str, Any], why: str) -> None:
    found = score(text, **arguments)
    assert (found.value, found.outcome) == (0.0, Outcome.wrong_format)
    assert found.detail and re.search(why, found.detail), found.detail


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


@given(VALUES, st.sampled_from([None, 2]), st.booleans())
def test_whatever_json_writes_is_valid_and_cut_short_it_is_not(value: Any, indent: int | None, ascii_only: bool) -> None:
    text = json.dumps(value, indent=indent, ensure_ascii=ascii_only)
    assert score(text, part="all").value == 1
    if text[-1] in "]}":
        assert score(text[:-1], part="all").value == 0


def test_a_reference_to_elsewhere_is_never_fetched() -> None:
    with pytest.raises(Exception, match="Unresolvable"):
        score("{}", schema={"$ref": "http://127.0.0.1:9/schema.json"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keys": "ab"}, "keys is 'ab'; it must be a list of different names"),
        ({"keys": ["a", "a"]}, "keys is"),
        ({"schema": {"type": "objekt"}}, "schema is no JSON Schema: at"),
        ({"schema": "a.json"}, "schema is 'a.json'; it must be a JSON Schema"),
        ({"part": "json"}, "part is 'json'"),
        ({"fenced": 1}, "fenced is 1; it must be true or false"),
    ],
)
def test_arguments_that_cannot_work(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        json_valid.check_arguments(**{"part": "all", "fenced": True, "keys": None, "schema": None, **changes})  # type: ignore[attr-defined]
