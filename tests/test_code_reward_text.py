"""The code reward's text side: which program a completion commits to, when outputs and values are the same, what tests may say."""

from __future__ import annotations

import json
import math
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo.rewards.code import TestsError, check_tests, extract_program, parse_tests
from grpo.rewards.code.cases import AssertTests, CallCase, CallTests, StdinCase, StdinTests
from grpo.rewards.code.compare import OutputRule, same_output, same_value
from grpo.rewards.code.extract import fenced_blocks
from grpo.types import Problem

# ---------------------------------------------------------------- from a completion to a program


@pytest.mark.parametrize(
    ("text", "program"),
    [
        pytest.param("Sure:\n```python\nx = 1\n```\nDone.", "x = 1\n", id="python"),
        pytest.param("```py\nx = 1\n```", "x = 1\n", id="py"),
        pytest.param("```Python3\nx = 1\n```", "x = 1\n", id="upper case"),
        pytest.param("``` python title='a'\nx = 1\n```", "x = 1\n", id="info after the language"),
        pytest.param("```{.python}\nx = 1\n```", "x = 1\n", id="braces"),
        pytest.param("```\nx = 1\n```", "x = 1\n", id="no language"),
        pytest.param("~~~python\nx = '```'\n~~~", "x = '```'\n", id="tildes"),
        pytest.param("~~~python\nx = 1\n```\ny = 2\n~~~", "x = 1\n```\ny = 2\n", id="only its own kind closes"),
        pytest.param("````python\nx = 1\n```\ny = 2\n````", "x = 1\n```\ny = 2\n", id="four marks"),
        pytest.param("```python\nx = 1\n```\nbetter:\n```python\nx = 2\n```", "x = 2\n", id="the last one"),
        pytest.param("```python\nx = 1\n```\nprints\n```\n1\n```", "x = 1\n", id="a language goes before none"),
        pytest.param("```python\nx = 1\n```\n```bash\npip install x\n```", "x = 1\n", id="another language does not count"),
        pytest.param("```python\nx = 1\n", "x = 1\n\n", id="never closed"),
        pytest.param("```python\r\nx = 1\r\ny = 2\r\n```", "x = 1\ny = 2\n", id="CRLF"),
        pytest.param("1. so:\n   ```python\n   if x:\n       y()\n   ```\n", "if x:\n    y()\n", id="indented"),
        pytest.param("- ```python\n  x = 1\n  ```", "x = 1\n", id="in a list item"),
        pytest.param("\t```python\n\tx = 1\n\t```", "x = 1\n", id="tab"),
        pytest.param(
            '```python\ndef f():\n    """\n    ```\n    f()\n    ```\n    """\n    return 1\n```\nend', None, id="fence in a docstring"
        ),
        pytest.param('```python\n"""\n```\nf()\n```\n"""\nx = 1\n```\nend', None, id="fence in the module's docstring"),
        pytest.param("```python\nx = '''a\n```\n''' + \"\"\n```", "x = '''a\n```\n''' + \"\"\n", id="fence in a string"),
        pytest.param("```python\nx = 1  # don't '''\n```\ntext\n```\n", "x = 1  # don't '''\n", id="quote marks in a comment"),
        pytest.param("```python\nx = 'it\\'s'\ny = '\"\"\"'\n```\nno", "x = 'it\\'s'\ny = '\"\"\"'\n", id="quote marks in short strings"),
        pytest.param('```python\nx = """\n```\nIt ends there.', 'x = """\n', id="a string that never ends does not swallow the text"),
        pytest.param("<answer>\n```python\nx = 1\n```\n</answer>\n```python\nx = 2\n```", "x = 1\n", id="the answer goes first"),
        pytest.param("<answer>x = 1\n</answer>", "x = 1\n", id="an answer without a fence"),
        pytest.param("```python\nx = 1\n```\n<answer>\n```python\nx = 2</answer>", "x = 2\n", id="closed by the end of the answer"),
        pytest.param("<answer>```python\nx = 1\n```", "x = 1\n", id="answer never closed"),
        pytest.param("<think>```python\nx = 1\n```</think>\n```python\nx = 2\n```", "x = 2\n", id="thinking does not count"),
        pytest.param("```python\nx = 1\n```</think>\n```\nx = 2\n```", "x = 2\n", id="thinking that the prompt began"),
    ],
)
def test_extract(text: str, program: str | None) -> None:
    if program is None:  # everything up to the last fence
        program = text.removeprefix("```python\n").removesuffix("```\nend")
        compile(program, "program", "exec")
    assert extract_program(text) == program


@pytest.mark.parametrize(
    "text",
    [
        "",
        "def f(): pass",
        "`x = 1`",
        "```python\n```",
        "```python\n  \n```",
        "```java\nint x;\n```",
        "<think>```python\nx = 1\n```",
        "```python\nx = 1\n```\n<answer></answer>",
    ],
)
def test_extract_nothing(text: str) -> None:
    assert extract_program(text) is None


def test_extract_goes_on_where_the_prompt_ends() -> None:
    assert extract_program("x = 1\n```\nmore", prompt="Task: …\n```python") == "x = 1\n"
    assert extract_program("x = 1\n```", prompt="Task: …\n```python\n") == "x = 1\n"
    assert extract_program("x = 1\n~~~", prompt="Task: …\n~~~py\n") == "x = 1\n"
    assert extract_program("x = 1\n", prompt="For example:\n```\n1\n```\n") is None, "a fence without a language may be a closing one"
    assert extract_program("hm\n```python\nx = 1\n```", prompt="Task: …\n<think>\n") is None, "all of it is thinking"


@given(st.text(alphabet=st.sampled_from("`~ \n\"'#\\pyx<>/think"), max_size=200))
def test_extract_takes_any_text(text: str) -> None:
    for block in fenced_blocks(text):
        assert "\n".join(line.lstrip() for line in block.text.split("\n")).strip("\n") in "\n".join(
            line.lstrip() for line in text.split("\n")
        )


@given(
    st.lists(st.sampled_from(["x = 1", "    y = '''z'''", "", "# it's"]), min_size=1), st.sampled_from(["```", "~~~~"]), st.integers(0, 4)
)
def test_extract_gives_back_what_was_fenced(lines: list[str], fence: str, indent: int) -> None:
    fenced = "\n".join(" " * indent + line for line in [f"{fence}python", *lines, fence])
    expected = "\n".join(lines) + "\n"
    assert extract_program(f"Some text\n{fenced}\nmore text") == (expected if expected.strip() else None)


def test_extract_takes_linear_time() -> None:
    """Each of these lines could open, close or hide a block from all others: looking for the end from each would take minutes."""
    for lines in (["```python", 'x = """', "```"], ["```python"], ['"""', "```"], ["'\"" * 20], ['\\"' * 20 + '"']):
        text = "\n".join(lines * 50_000)
        before = time.process_time()
        extract_program(text)
        assert time.process_time() - before < 20  # 1 s at most was measured


# ---------------------------------------------------------------- printed output


@pytest.mark.parametrize(
    ("got", "expected", "tokens", "lines"),
    [
        ("7\n", "7", True, True),
        ("7", "7\n\n", True, True),
        ("1 2\n", "1  2", True, False),
        ("1\n2\n", "1 2", True, False),
        ("1 \n2\t\n", "1\n2\n", True, True),
        (" 1\n", "1\n", True, False),
        ("a\r\nb\r\n", "a\nb\n", True, True),
        ("a\n\nb", "a\nb", True, False),
        ("", "\n", True, True),
        ("", "0", False, False),
        ("7 7", "7", False, False),
        ("YES", "yes", False, False),
        ("07", "7", False, False),
        ("7.0", "7", False, False),
        ("7", "7.0", True, False),
        ("0.30000000000000004", "0.3", True, False),
        ("0.3000005", "0.3", True, False),  # |Δ| = 5e-7 ≤ 1e-6 · max(1, 0.3)
        ("0.300002", "0.3", False, False),  # 2e-6
        ("1000000.5", "1000000.0", True, False),  # 0.5 ≤ 1e-6 · 1e6
        ("1000002.0", "1000000.0", False, False),
        ("1e-3", "0.001", True, False),
        ("0.1.2", "0.1", False, False),
        ("nan", "0.5", False, False),
        ("inf", "1e308", False, False),
        ("1e999", "1e308", False, False),
        ("nan", "nan", True, True),  # the same text
        ("1_0.0", "10.0", False, False),
        ("٣.0", "3.0", False, False),
    ],
)
def test_same_output(got: str, expected: str, tokens: bool, lines: bool) -> None:
    assert same_output(got, expected, OutputRule.tokens) is tokens
    assert same_output(got, expected, OutputRule.lines) is lines


def test_same_output_without_tolerance_is_the_same_text() -> None:
    assert not same_output("0.30", "0.3", tolerance=0)
    assert same_output("0.31", "0.3", tolerance=0.1)


@given(st.text(), st.text(alphabet=" \t\n\r"))
def test_white_space_at_the_end_never_matters(text: str, end: str) -> None:
    assert same_output(text + end, text, OutputRule.tokens) and same_output(text + end, text, OutputRule.lines)


# ---------------------------------------------------------------- returned values


class Everything(int):
    """Equal to whatever it is compared with."""

    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = int.__hash__


@pytest.mark.parametrize(
    ("got", "expected", "same"),
    [
        (1, 1, True),
        (1, True, True),
        (True, 1, True),
        (1.0, 1, True),
        (2, 1, False),
        (0.1 + 0.2, 0.3, True),
        (0.3 + 1e-5, 0.3, False),
        (1.0000001, 1, False),  # an integer was expected: no tolerance
        (float("nan"), 0.5, False),
        (math.nan, math.nan, False),
        (math.inf, math.inf, True),
        (-math.inf, 1e308, False),
        (10**400, 0.5, False),
        (10**400, 10**400, True),
        ("1", 1, False),
        (1, "1", False),
        (b"a", "a", False),
        (None, None, True),
        (None, 0, False),
        (0, None, False),
        (False, None, False),
        ([], None, False),
        ((1, [2]), [1, (2,)], True),
        ([1, 2], [1, 2, 3], False),
        ([1, 2], [2, 1], False),
        ({1, 2}, [1, 2], False),
        ({1, 2}, {2, 1}, True),
        ("ab", ["a", "b"], False),
        ({1: 2}, {"1": 2}, True),
        ({"1": 2}, {"1": 2}, True),
        ({1: 2, "1": 2}, {"1": 2}, False),
        ({None: 1, True: 2, 1.5: 3}, {"null": 1, "true": 2, "1.5": 3}, True),
        ({"a": 1}, {"a": 1, "b": 2}, False),
        ({"b": 1}, {"a": 1}, False),
        ({10**5000: 1}, {"1": 1}, False),
        ({1: 2}, {1: 2}, True),
        ({"a": [0.1 + 0.2]}, {"a": [0.3]}, True),
        (Everything(3), 5, False),
        ([Everything(3)], [5], False),
        ({"a": Everything(3)}, {"a": 5}, False),
        (object(), 5, False),
    ],
)
def test_same_value(got: Any, expected: Any, same: bool) -> None:
    assert same_value(got, expected) is same


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@given(VALUES)
def test_a_value_is_the_same_as_itself_through_json(value: Any) -> None:
    assert same_value(value, json.loads(json.dumps(value)))
    assert same_value(value, json.loads(json.dumps(value)), tolerance=0)


@given(VALUES, VALUES)
def test_without_tolerance_and_tuples_same_value_is_equality(first: Any, second: Any) -> None:
    assert same_value(first, second, tolerance=0) == (first == second)


# ---------------------------------------------------------------- the tests column


def test_tests_of_each_kind() -> None:
    assert parse_tests({"kind": "stdin", "cases": [{"input": "1", "output": "2"}], "cpu_s": 3}) == StdinTests(
        cases=(StdinCase(input="1", output="2"),), cpu_s=3.0
    )
    call = {"kind": "call", "function": "f", "cases": [{"args": [1, [2]], "expected": None}, {"args": [], "accepted": [1, 2]}]}
    assert parse_tests(json.dumps(call)) == CallTests(
        function="f", cases=(CallCase(args=(1, [2]), accepted=(None,)), CallCase(args=(), accepted=(1, 2)))
    )
    asserts = {"kind": "asserts", "functions": ["f", "g"], "programs": ["assert f(g(1))"], "setup": "import math", "live": True}
    assert parse_tests(asserts) == AssertTests(functions=("f", "g"), programs=("assert f(g(1))",), setup="import math", live=True)


ONE = {"input": "1", "output": "2"}


@pytest.mark.parametrize(
    ("tests", "says"),
    [
        ("{", "is text, but not JSON"),
        ([1], "is a list, not an object"),
        ({"cases": []}, "tests.kind is None; it must be one of stdin, call, asserts"),
        ({"kind": "stdout"}, "tests.kind is 'stdout'"),
        ({"kind": ["stdin"]}, "tests.kind is ['stdin']"),
        ({"kind": "stdin"}, "lack cases"),
        ({"kind": "stdin", "cases": []}, "tests.cases is []; it must be a list with at least one item"),
        ({"kind": "stdin", "cases": [ONE], "function": "f"}, "do not have function; they have cases, cpu_s, kind, prelude"),
        ({"kind": "stdin", "cases": [ONE, {"input": "1"}]}, "tests.cases[1] is {'input': '1'}"),
        ({"kind": "stdin", "cases": [{"input": 1, "output": "2"}]}, "tests.cases[0]"),
        ({"kind": "stdin", "cases": [ONE], "cpu_s": 0}, "tests.cpu_s is 0"),
        ({"kind": "stdin", "cases": [ONE], "cpu_s": math.inf}, "tests.cpu_s is inf"),
        ({"kind": "call", "function": "f g", "cases": [{"args": [], "expected": 1}]}, "which is not the name of a function"),
        ({"kind": "call", "function": "f", "cases": [{"args": 1, "expected": 1}]}, "tests.cases[0].args is 1, not a list"),
        ({"kind": "call", "function": "f", "cases": [{"args": [1]}]}, "tests.cases[0] is {'args': [1]}"),
        ({"kind": "call", "function": "f", "cases": [{"args": [], "accepted": []}]}, "tests.cases[0].accepted is []"),
        ({"kind": "asserts", "functions": ["f"], "programs": [1]}, "tests.programs[0] is a int, not text"),
        ({"kind": "asserts", "functions": [], "programs": ["assert f()"]}, "tests.functions is []"),
        ({"kind": "asserts", "functions": ["f"], "programs": ["f()"], "live": "yes"}, "tests.live is 'yes'"),
        ({"kind": "asserts", "functions": ["f"], "programs": ["f()"], "setup": 1}, "tests.setup is 1, not text"),
    ],
)
def test_malformed_tests_say_where(tests: Any, says: str) -> None:
    with pytest.raises(TestsError) as error:
        parse_tests(tests)
    assert says in str(error.value)
    assert f"problem 'p7': {error.value}" == check_tests(Problem(id="p7", prompt="", answer="", columns={"tests": tests}))


def test_a_problem_without_tests_names_its_columns() -> None:
    assert "problem 'p7' has no column 'tests', but: question, answer" in str(
        check_tests(Problem(id="p7", prompt="", answer="", columns={"question": "?", "answer": ""}))
    )
    assert check_tests(Problem(id="p7", prompt="", answer="", columns={"tests": {"kind": "stdin", "cases": [ONE]}})) is None
