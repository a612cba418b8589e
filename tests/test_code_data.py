"""Programming problems: what the adapters make of rows of HumanEval, MBPP, LeetCodeDataset, APPS and TACO, and the generated ones."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from grpo.config import ConfigError
from grpo.data import PromptFormat, check_disjoint, load_problems
from grpo.data_code import RowError, apps, code_problems, humaneval, leetcode, mbpp, without_function
from grpo.data_functions import FAMILIES, small_functions
from grpo.plan import load_split, plan
from grpo.recipe import load_recipe
from grpo.rewards.code import CodeReward, check_tests, parse_tests
from grpo.rewards.code.cases import AssertTests, CallCase, CallTests, StdinTests
from grpo.rewards.sandbox import Sandbox

DATA = Path(__file__).resolve().parent / "code_data"


@pytest.fixture(scope="module")
def reward() -> Iterator[CodeReward]:
    with Sandbox(workers=1) as box:
        yield CodeReward(box=box)


def first_row(name: str) -> dict[str, Any]:
    row = json.loads((DATA / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert isinstance(row, dict)
    return row


# ---------------------------------------------------------------- HumanEval


def test_humaneval() -> None:
    row = humaneval(first_row("humaneval"))
    assert row["id"] == "HumanEval/0"
    assert row["question"].endswith('    """\n') and "def has_close_elements" in row["question"]
    tests = parse_tests(row["tests"])
    assert isinstance(tests, AssertTests)
    assert tests.functions == ("has_close_elements",)
    assert tests.prelude == tests.setup == "from typing import List\n", "the imports, without the function"
    assert "def check(candidate)" in tests.programs[0] and tests.programs[0].endswith("check(has_close_elements)\n")


def test_helpers_of_the_question_stay() -> None:
    prompt = "import math\n\n\ndef helper(x):\n    return x\n\n\n@wrapped\ndef wanted(x):\n    '''Doc.'''\n"
    assert without_function(prompt, "wanted") == "import math\n\n\ndef helper(x):\n    return x\n"
    assert without_function(prompt, "helper").endswith("@wrapped\ndef wanted(x):\n    '''Doc.'''\n")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"prompt": None}, "a NoneType, not text, in column 'prompt'"),
        ({"test": 1}, "a int, not text, in column 'test'"),
        ({"entry_point": "other"}, "the prompt does not define other"),
        ({"prompt": "def f(:"}, "its prompt does not compile"),
    ],
)
def test_humaneval_refuses(change: dict[str, Any], says: str) -> None:
    with pytest.raises(RowError, match=says):
        humaneval({**first_row("humaneval"), **change})


def test_a_missing_column_is_named() -> None:
    with pytest.raises(RowError, match="it has no column 'prompt'; its columns are: text"):
        humaneval({"text": ""})


# ---------------------------------------------------------------- MBPP

MBPP = {
    "task_id": 9,
    "text": "Write a function to add.",
    "code": "import sys, math as m\r\ndef helper(x):\r\n  return x\r\ndef add(a, b):\r\n  return helper(a) + b",
    "test_setup_code": "",
    "test_list": ["assert add(1, 2) == 3", "assert add(2, 2) == 4", "assert add(m.floor(1.5), 0) == 1"],
    "challenge_test_list": [],
}


def test_mbpp() -> None:
    row = mbpp(MBPP)
    assert row["id"] == "mbpp/9"
    assert row["question"] == "Write a function to add.\nYour code should pass this test:\nassert add(1, 2) == 3"
    assert parse_tests(row["tests"]) == AssertTests(
        functions=("add",), programs=tuple(MBPP["test_list"]), setup="import sys, math as m"
    )  # m is an import of the reference program that the tests use; helper is no function that they call


def test_mbpp_shows_as_many_tests_as_asked_for() -> None:
    assert mbpp(MBPP, shown=2)["question"].endswith("these tests:\nassert add(1, 2) == 3\nassert add(2, 2) == 4")
    with pytest.raises(ConfigError, match="shown"):
        mbpp(MBPP, shown=0)


def test_sanitized_mbpp() -> None:
    row = {
        "prompt": "Add.",
        "code": "def add(a, b):\n  return a + b",
        "test_imports": ["import math"],
        "test_list": ["assert add(1, 2) == 3"],
    }
    adapted = mbpp(row)
    assert "id" not in adapted, "load_problems numbers them"
    assert adapted["tests"]["setup"] == "import math"


def test_mbpp_tests_that_make_objects_of_the_program_are_live() -> None:
    row = {**MBPP, "code": "class Pair:\n  pass\ndef add(p):\n  return 1", "test_list": ["assert add(Pair()) == 1"]}
    assert mbpp(row)["tests"]["live"] is True
    assert mbpp(row)["tests"]["functions"] == ["add"]
    assert mbpp({**row, "test_list": ["assert add(1) == 1"]})["tests"]["live"] is False


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"test_list": []}, "its test_list holds no list, or an empty one"),
        ({"test_list": ["assert other(1)"]}, "its tests call no function of its reference program"),
        ({"test_list": ["assert add(1"]}, "its test program does not compile"),
        ({"code": "def add(:"}, "its reference program does not compile"),
    ],
)
def test_mbpp_refuses(change: dict[str, Any], says: str) -> None:
    with pytest.raises(RowError, match=says):
        mbpp({**MBPP, **change})


# ---------------------------------------------------------------- LeetCode

LEETCODE = {
    "task_id": "double-it",
    "problem_description": "Double a number.",
    "starter_code": "class Solution:\n    def doubleIt(self, n: int) -> int:\n        ",
    "prompt": "from typing import *\nclass ListNode:\n    def __init__(self, val=0, next=None):\n        self.val, self.next = val, next\n",
    "entry_point": "Solution().doubleIt",
    "completion": "class Solution:\n    def doubleIt(self, n: int) -> List[int]:\n        return 2 * n\n",
    "test": "def check(candidate):\n    assert candidate(n = 2) == 4\n    assert candidate(n = 5) == 10\n",
}
LINKED = {
    **LEETCODE,
    "entry_point": "Solution().second",
    "completion": "class Solution:\n    def second(self, head):\n        return head.next.val\n",
    "test": "def check(candidate):\n    assert candidate(head = ListNode(1, ListNode(7))) == 7\n",
}


def test_leetcode(reward: CodeReward) -> None:
    row = leetcode(LEETCODE)
    assert row["question"].startswith("Double a number.\n\nComplete this class:\nclass Solution:") and row["id"] == "double-it"
    tests = parse_tests(row["tests"])
    assert isinstance(tests, AssertTests) and tests.functions == ("doubleIt",)
    judgement = reward.judge(row["answer"], tests)
    assert judgement.passed == 1 and not judgement.forgeable
    assert reward.judge(row["answer"].replace("2 * n", "n"), tests).passed == 0


def test_leetcode_with_a_linked_list_needs_live_objects(reward: CodeReward) -> None:
    row = leetcode(LINKED)
    judgement = reward.judge(row["answer"], parse_tests(row["tests"]))
    assert judgement.passed == 1 and judgement.forgeable
    assert reward.judge(row["answer"].replace(".next", ""), parse_tests(row["tests"])).passed == 0


# ---------------------------------------------------------------- APPS and TACO


def apps_row(**given: Any) -> dict[str, Any]:
    return {
        "problem_id": 3,
        "question": "Do it.\n",
        "starter_code": "",
        "solutions": '["print(1)", "x"]',
        "input_output": json.dumps(given),
    }


def test_apps_script() -> None:
    row = apps(apps_row(inputs=["1 2\n", ["3", "4"]], outputs=["3\n", ["7", ""]]))
    assert row["id"] == "3" and row["answer"] == "print(1)"
    assert row["question"] == "Do it.\n\nRead from standard input and print to standard output."
    tests = parse_tests(row["tests"])
    assert isinstance(tests, StdinTests)
    assert [(case.input, case.output) for case in tests.cases] == [("1 2\n", "3\n"), ("3\n4\n", "7\n\n")], "lists of lines are joined"


def test_apps_function() -> None:
    row = apps({**apps_row(fn_name="f", inputs=[[1, 2], [[3]]], outputs=[3, [1, 2]]), "starter_code": "def f(x):"})
    assert row["question"] == "Do it.\n\ndef f(x):\n\nWrite a function named f."
    assert parse_tests(row["tests"]) == CallTests(
        function="f", cases=(CallCase(args=(1, 2), accepted=(3,)), CallCase(args=([3],), accepted=([1, 2],)))
    )


def test_apps_results_that_are_wrapped_throughout_are_right_both_ways() -> None:
    wrapped = parse_tests(apps(apps_row(fn_name="f", inputs=[[1], [2]], outputs=[[3], [4]]))["tests"])
    assert isinstance(wrapped, CallTests) and [case.accepted for case in wrapped.cases] == [([3], 3), ([4], 4)]
    mixed = parse_tests(apps(apps_row(fn_name="f", inputs=[[1], [2]], outputs=[[3], [4, 5]]))["tests"])
    assert isinstance(mixed, CallTests) and [case.accepted for case in mixed.cases] == [([3],), ([4, 5],)]


def test_apps_takes_the_first_cases() -> None:
    row = apps_row(inputs=list(map(str, range(50))), outputs=list(map(str, range(50))))
    assert [case["input"] for case in apps(row, max_cases=3)["tests"]["cases"]] == ["0", "1", "2"]
    assert len(apps(row)["tests"]["cases"]) == 20
    with pytest.raises(ConfigError, match="max_cases"):
        apps(row, max_cases=0)


@pytest.mark.parametrize(
    ("row", "says"),
    [
        (apps_row(inputs=[], outputs=[]), "its inputs holds no list, or an empty one"),
        (apps_row(inputs=["1"], outputs=["1", "2"]), "it has 1 inputs, but 2 outputs"),
        (apps_row(inputs=[1], outputs=["1"]), "neither text nor a list of lines"),
        (apps_row(fn_name="f", inputs=["1"], outputs=[1]), "not a list of arguments"),
        ({**apps_row(), "input_output": ""}, "its input_output is not JSON"),
        ({**apps_row(), "input_output": "[1]"}, "its input_output is not an object"),
    ],
)
def test_apps_refuses(row: dict[str, Any], says: str) -> None:
    with pytest.raises(RowError, match=says):
        apps(row)


# ---------------------------------------------------------------- as a source of problems


def source(tmp_path: Path, rows: list[dict[str, Any]], **settings: Any) -> list[Any]:
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    files = {"train": str(tmp_path / "train.jsonl"), "heldout": str(tmp_path / "none.jsonl")}
    return code_problems("train", rows={"fn": "grpo.data.jsonl", **files}, adapter={"fn": "grpo.data_code.mbpp"}, **settings)


def test_a_source_of_problems(tmp_path: Path) -> None:
    problems = load_problems(source(tmp_path, [MBPP, {**MBPP, "task_id": 10}]), "train", PromptFormat(template="{question}\n```python"))
    assert [problem.id for problem in problems] == ["mbpp/9", "mbpp/10"]
    assert problems[0].prompt.endswith("== 3\n```python") and problems[0].answer.startswith("import sys")
    assert all(check_tests(problem) is None for problem in problems)


def test_a_recipe_that_names_rows_and_adapter_gives_problems(tmp_path: Path) -> None:
    source(tmp_path, [MBPP])
    files = f"data.problems.rows={{fn: grpo.data.jsonl, train: {tmp_path / 'train.jsonl'}, heldout: none.jsonl}}"
    checked = plan(load_recipe("r1_zero_code", files, "~data.problems.rows.path", "~data.problems.rows.name"))
    assert [problem.id for problem in load_split(checked, "train")] == ["mbpp/9"]


def test_a_row_that_cannot_be_used_is_an_error_or_is_counted(tmp_path: Path) -> None:
    rows = [MBPP, {**MBPP, "test_list": []}]
    with pytest.raises(ConfigError, match=r"cannot use 1 of the rows, e\.g\. row 1 of the train split: its test_list") as error:
        source(tmp_path, rows)
    assert "data.problems.drop_unusable=true" in str(error.value)
    with pytest.warns(UserWarning, match="1 of 2 rows were left out, e.g. row 1 of the train split"):
        assert len(source(tmp_path, rows, drop_unusable=True)) == 1


def test_an_adapter_of_ones_own_is_checked_too(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def adapt(row):\n    return {'question': 'q', 'answer': '', 'tests': {'kind': 'odd'}}\n")
    (tmp_path / "train.jsonl").write_text("{}\n")
    rows = {"fn": "grpo.data.jsonl", "train": str(tmp_path / "train.jsonl"), "heldout": "none"}
    with pytest.raises(ConfigError, match=r"tests\.kind is 'odd'"):
        code_problems("train", rows=rows, adapter={"fn": f"{tmp_path}/mine.py:adapt"})
    with pytest.raises(ConfigError, match=r"data\.problems\.adapter\.show"):
        code_problems("train", rows=rows, adapter={"fn": "grpo.data_code.mbpp", "show": 1})


# ---------------------------------------------------------------- generated functions


def test_small_functions_pass_their_own_tests(reward: CodeReward) -> None:
    rows = small_functions("train") + small_functions("heldout")
    assert len(rows) == 12 * len(FAMILIES) and len({row["question"] for row in rows}) == len(rows)
    for row in rows:
        assert reward.judge(row["answer"], parse_tests(row["tests"])).verdict == "passed", row


def test_small_functions_are_not_solved_by_another_k_or_family(reward: CodeReward) -> None:
    """Their eight calls tell each problem from its neighbour: the same family with another k, and the next family."""
    for k in 3, 7:
        programs = [family.python.format(k=k) for family in FAMILIES]
        for number, row in enumerate(_rows_of(k)):
            for other in (FAMILIES[number].python.format(k=k + 1), programs[number - 1]):
                judgement = reward.judge(f"def f(x):\n    return {other}\n", parse_tests(row["tests"]))
                assert judgement.passed < judgement.total, (row["question"], other)


def _rows_of(k: int) -> list[Any]:
    rows = {row["answer"]: row for row in [*small_functions("train", low=k, high=k), *small_functions("heldout", low=k, high=k)]}
    return [rows[f"def f(x):\n    return {family.python.format(k=k)}\n"] for family in FAMILIES]


def test_small_functions_are_held_out_whatever_the_seed() -> None:
    form = PromptFormat(template="{question}")
    for seed in 0, 1:
        train = load_problems(small_functions("train", seed=seed), "train", form)
        check_disjoint(train, load_problems(small_functions("heldout", seed=seed + 5), "heldout", form))
    assert small_functions("train", seed=1) != small_functions("train", seed=2)
    assert small_functions("heldout", seed=1) == small_functions("heldout", seed=2)
    assert small_functions("train", seed=1) == small_functions("train", seed=1)
    with pytest.raises(ConfigError, match="low=0"):
        small_functions("train", low=0)
