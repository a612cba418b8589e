"""The code reward on a real sandbox: right programs pass, wrong and hostile ones do not, in each style of tests."""

from __future__ import annotations

import ast
import json
import math
import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from grpo.data_code import humaneval, mbpp
from grpo.rewards.base import call, parse_reward_config
from grpo.rewards.code import CodeReward, Judgement, TestsError, Verdict, code_reward, parse_tests, proctor
from grpo.rewards.code.verdict import Case
from grpo.rewards.runtime import RewardRuntime
from grpo.rewards.sandbox import Call, Execution, Limits, Sandbox, SandboxError
from grpo.types import Completion, FinishReason, Outcome, Problem, Score

DATA = Path(__file__).resolve().parent / "code_data"
PROBLEMS = yaml.safe_load((DATA / "problems.yaml").read_text(encoding="utf-8"))

# A program that does its worst to be called equal, in every function it is asked for.
EVERYTHING = """
class Everything:
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    def __lt__(self, other): return True
    __le__ = __gt__ = __ge__ = __contains__ = __lt__
    def __hash__(self): return 0
    def __getattr__(self, name): return self
    def __call__(self, *args, **kwargs): return self
    def __iter__(self): return iter([self])
    def __getitem__(self, index): return self
    def __add__(self, other): return self
    __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __add__
    def __abs__(self): return self
    def __bool__(self): return True
    def __len__(self): return 1
    def __float__(self): return 0.0
    def __index__(self): return 0
"""


@pytest.fixture(scope="module")
def box() -> Iterator[Sandbox]:
    with Sandbox(workers=1) as sandbox:
        yield sandbox


@pytest.fixture(scope="module")
def strict(box: Sandbox) -> CodeReward:
    return CodeReward(box=box)


@pytest.fixture(scope="module")
def partial(box: Sandbox) -> CodeReward:
    return CodeReward(score="share", box=box)


def completion(text: str) -> Completion:
    return Completion(
        problem_id="p",
        index=0,
        prompt_ids=(1,),
        token_ids=(1,),
        text=text,
        logprobs=(0.0,),
        policy_versions=(0,),
        finish_reason=FinishReason.stop,
    )


def problem(tests: Any) -> Problem:
    return Problem(id="p", prompt="Write it.", answer="", columns={"tests": tests})


def score(reward: Any, program: str, tests: Any) -> Score:
    result = reward(completion(f"Here it is:\n```python\n{program}\n```\n"), problem(tests))
    assert isinstance(result, Score)
    return result


def column_of(kind: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    """An entry of ``problems.yaml`` as a ``tests`` column."""
    if kind == "asserts":
        return {"kind": kind, **{key: entry[key] for key in entry if key not in ("name", "answer", "wrong", "forgeable")}}
    if kind == "stdin":
        return {"kind": kind, "cases": [{"input": given, "output": wanted} for given, wanted in entry["cases"]]}
    cases = [
        {"args": args, **(wanted if isinstance(wanted, dict) and "accepted" in wanted else {"expected": wanted})}
        for args, wanted in entry["cases"]
    ]
    return {"kind": kind, "function": entry["function"], "cases": cases}


def gutted(program: str, functions: list[str], body: str) -> str:
    """The program with another body in these functions (or methods); an assignment to such a name becomes a function."""

    class Gut(ast.NodeTransformer):
        def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
            if node.name in functions:
                node.args = ast.parse("def f(*args, **kwargs): pass").body[0].args  # type: ignore[attr-defined]
                node.body = ast.parse(body).body
            return node

        def visit_Assign(self, node: ast.Assign) -> ast.AST:
            name = node.targets[0].id if isinstance(node.targets[0], ast.Name) else ""
            return ast.parse(f"def {name}(*args, **kwargs): {body}").body[0] if name in functions else node

    return ast.unparse(ast.fix_missing_locations(Gut().visit(ast.parse(program))))


def entries(kind: str) -> list[Any]:
    return [pytest.param(entry, id=entry["name"]) for entry in PROBLEMS[kind]]


# ---------------------------------------------------------------- our own problems


@pytest.mark.parametrize("kind", ["stdin", "call", "asserts"])
def test_there_are_enough_problems(kind: str) -> None:
    assert len({entry["name"] for entry in PROBLEMS[kind]}) >= 25


@pytest.mark.parametrize("entry", entries("stdin"))
def test_scripts(strict: CodeReward, entry: dict[str, Any]) -> None:
    tests = column_of("stdin", entry)
    result = score(strict, entry["answer"], tests)
    assert (result.value, result.outcome) == (1.0, Outcome.ok)
    assert result.detail == f"passed: {len(entry['cases'])} of {len(entry['cases'])} cases passed"
    assert result.tags == ("passed", f"sandbox:{strict.box.level}"), "counted in the metrics: the verdict, and how it was confined"
    wrong = score(strict, entry["wrong"], tests)
    assert wrong.value == 0 and wrong.outcome is Outcome.ok and wrong.detail.startswith(("wrong_answer: ", "runtime_error: ")), wrong


@pytest.mark.parametrize("entry", entries("call"))
def test_calls(strict: CodeReward, entry: dict[str, Any]) -> None:
    tests = column_of("call", entry)
    right = score(strict, entry["answer"], tests)
    assert right.value == 1 and right.outcome is Outcome.ok, right
    wrong = score(strict, entry["wrong"], tests)
    assert wrong.value == 0 and wrong.outcome is not Outcome.error, wrong
    for body in "pass", "return Everything()":
        if entry["name"] != "none" or body != "pass":  # where None is the answer
            assert score(strict, EVERYTHING + gutted(entry["answer"], [entry["function"]], body), tests).value == 0


@pytest.mark.parametrize("entry", entries("asserts"))
def test_asserts(strict: CodeReward, entry: dict[str, Any]) -> None:
    tests = column_of("asserts", entry)
    right = score(strict, entry["answer"], tests)
    assert right.value == 1, right
    assert ("[forgeable]" in right.detail) == entry.get("forgeable", False)
    wrong = score(strict, entry["wrong"], tests)
    assert wrong.value == 0 and wrong.detail.startswith("wrong_answer: 0 of 1" if len(entry["programs"]) == 1 else "wrong_answer: "), wrong
    for body in "pass", "return Everything()":
        assert score(strict, EVERYTHING + gutted(entry["answer"], entry["functions"], body), tests).value == 0


# ---------------------------------------------------------------- HumanEval and MBPP


def rows(name: str) -> list[Any]:
    adapt = {"humaneval": humaneval, "mbpp": mbpp}[name]
    found = [adapt(json.loads(line)) for line in (DATA / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
    return [pytest.param(row, id=row["id"]) for row in found]


@pytest.mark.parametrize("row", rows("humaneval") + rows("mbpp"))
def test_reference_programs_pass_and_their_ruins_do_not(strict: CodeReward, row: dict[str, Any]) -> None:
    right = score(strict, row["answer"], row["tests"])
    assert right.value == 1, right
    assert ("[forgeable]" in right.detail) == (row["id"] in ("mbpp/533", "mbpp/601", "mbpp/927"))  # a type, own classes
    for body in "pass", "return Everything()":
        assert score(strict, EVERYTHING + gutted(row["answer"], row["tests"]["functions"], body), row["tests"]).value == 0


# ---------------------------------------------------------------- what is worth nothing, counted apart

STDIN = {"kind": "stdin", "cases": [{"input": "1\n", "output": "1"}, {"input": "2\n", "output": "2"}]}
CALLS = {"kind": "call", "function": "f", "cases": [{"args": [1], "expected": 1}, {"args": [2], "expected": 2}]}
ASSERTS = {"kind": "asserts", "functions": ["f"], "programs": ["assert f(1) == 1", "assert f(2) == 2"]}
BODY_OF_F = {
    "wrong_answer": "return -x",
    "runtime_error": "return 1 / 0",
    "timeout": "while True: pass",
    "memory": "return len(bytearray(3 << 30))",
    "killed": "import os; os.abort()",
    "compile_error": "return (x",
}
OUTCOMES = {
    "compile_error": Outcome.wrong_format,
    "no_function": Outcome.wrong_format,
    "no_code": Outcome.wrong_format,
    "timeout": Outcome.timeout,
    "memory": Outcome.memory,
}


@pytest.mark.parametrize("tests", [STDIN, CALLS, ASSERTS], ids=["stdin", "call", "asserts"])
@pytest.mark.parametrize("verdict", BODY_OF_F)
def test_what_the_model_caused_is_worth_0_and_named(box: Sandbox, tests: dict[str, Any], verdict: str) -> None:
    reward = CodeReward(cpu_s=0.5, total_cpu_s=1, memory_mb=256, box=box)
    program = f"def f(x):\n    {BODY_OF_F[verdict]}\n"
    result = score(reward, program + ("print(f(int(input())))\n" if tests is STDIN else ""), tests)
    assert result.value == 0
    assert result.detail.startswith(f"{verdict}: 0 of 2 cases passed"), result
    assert result.outcome is OUTCOMES.get(verdict, Outcome.ok)


@pytest.mark.parametrize(("tests", "verdict"), [(CALLS, "runtime_error"), (ASSERTS, "no_function")], ids=["call", "asserts"])
def test_a_program_without_the_function(strict: CodeReward, tests: dict[str, Any], verdict: str) -> None:
    result = score(strict, "def g(x): return x", tests)
    assert result.value == 0 and result.detail.startswith(f"{verdict}: 0 of 2") and "defines no" in result.detail, result


@pytest.mark.parametrize("tests", [STDIN, CALLS, ASSERTS], ids=["stdin", "call", "asserts"])
def test_no_program(strict: CodeReward, tests: dict[str, Any]) -> None:
    result = strict(completion("I would rather not."), problem(tests))
    assert (result.value, result.outcome, result.detail) == (0.0, Outcome.wrong_format, "no_code: 0 of 2 cases passed")


@pytest.mark.parametrize("tests", [STDIN, CALLS, ASSERTS], ids=["stdin", "call", "asserts"])
@pytest.mark.parametrize(
    ("body", "share"), [("return x", 1.0), ("return 1", 0.5), ("return x if x == 2 else 1 / 0", 0.5), ("return 0", 0.0)]
)
def test_share_of_cases(partial: CodeReward, strict: CodeReward, tests: dict[str, Any], body: str, share: float) -> None:
    program = f"def f(x):\n    {body}\n" + ("print(f(int(input())))\n" if tests is STDIN else "")
    assert score(partial, program, tests).value == share
    assert score(strict, program, tests).value == float(share == 1)


@pytest.mark.parametrize("tests", [CALLS, ASSERTS], ids=["call", "asserts"])
@pytest.mark.parametrize("end", ["while True: pass", "import os; os._exit(0)", "import os; os.abort()"])
def test_what_came_before_the_end_counts(box: Sandbox, tests: dict[str, Any], end: str) -> None:
    reward = CodeReward(score="share", cpu_s=0.4, total_cpu_s=0.5, box=box)
    result = score(reward, f"def f(x):\n    if x == 2:\n        {end}\n    return x\n", tests)
    assert result.value == 0.5, result


def test_all_cases_share_the_time_of_a_completion(box: Sandbox) -> None:
    """Each case takes 0.3 s of the 0.5 s that one may; all of them may take 1 s, which is used up during the fourth."""
    program = "import time\nwhile time.process_time() < 0.3: pass\nprint(input())"
    cases = [{"input": str(i), "output": str(i)} for i in range(8)]
    result = score(CodeReward(score="share", cpu_s=0.5, total_cpu_s=1.0, box=box), program, {"kind": "stdin", "cases": cases})
    assert result.outcome is Outcome.timeout and result.detail.startswith("timeout: 3 of 8"), result
    assert score(CodeReward(cpu_s=0.5, total_cpu_s=8, box=box), program, {"kind": "stdin", "cases": cases}).value == 1


def test_a_problem_may_bring_its_own_time(box: Sandbox) -> None:
    program = "import time\nwhile time.process_time() < 0.5: pass\nprint(input())"
    tests = {"kind": "stdin", "cases": [{"input": "a", "output": "a"}]}
    assert score(CodeReward(cpu_s=0.2, box=box), program, tests).outcome is Outcome.timeout
    assert score(CodeReward(cpu_s=0.2, box=box), program, {**tests, "cpu_s": 3}).value == 1
    assert score(CodeReward(cpu_s=9, box=box), program, {**tests, "cpu_s": 0.2}).outcome is Outcome.timeout


def test_output_rules(box: Sandbox) -> None:
    tests = {"kind": "stdin", "cases": [{"input": "", "output": "1 2\n0.5\n"}]}
    assert score(CodeReward(box=box), "print(1)\nprint(2)\nprint(0.5000001)", tests).value == 1
    assert score(CodeReward(tolerance=0, box=box), "print(1, 2)\nprint(0.5000001)", tests).value == 0
    assert score(CodeReward(output="lines", box=box), "print(1)\nprint(2)\nprint(0.5)", tests).value == 0
    assert score(CodeReward(output="lines", box=box), "print('1 2  ')\nprint(0.5)\nprint()", tests).value == 1


# ---------------------------------------------------------------- forging

SECRET = f"answer-{random.SystemRandom().randrange(1 << 24):06x}"
FORGERIES = yaml.safe_load((DATA / "forgeries.yaml").read_text(encoding="utf-8"))


@pytest.mark.parametrize("kind", ["stdin", "call", "asserts", "raises"])
@pytest.mark.parametrize("name", FORGERIES)
def test_forgeries_are_worth_0(partial: CodeReward, kind: str, name: str) -> None:
    program = FORGERIES[name]
    tests = {
        "stdin": {"kind": "stdin", "cases": [{"input": "1\n", "output": SECRET}]},
        "call": {"kind": "call", "function": "f", "cases": [{"args": [1], "expected": SECRET}]},
        "asserts": {"kind": "asserts", "functions": ["f"], "programs": [f"assert f(1) == {SECRET!r}"]},
        "raises": {
            "kind": "asserts",
            "functions": ["f"],
            "programs": [f"def check(g):\n    if g(1) != {SECRET!r}: raise ValueError\ncheck(f)"],
        },
    }[kind]
    result = score(partial, program + ("\nprint(f(input()))" if kind == "stdin" else ""), tests)
    assert result.value == 0 and result.outcome is not Outcome.error, result


@pytest.mark.parametrize("depth", [140, 160, 190, 196, 199, 200, 201, 300])
@pytest.mark.parametrize("tests", [CALLS, ASSERTS], ids=["call", "asserts"])
def test_no_depth_of_a_result_leaves_the_completion_unscored(strict: CodeReward, tests: dict[str, Any], depth: int) -> None:
    """The sandbox takes 200 levels; on their way to the tests, results stand in lists of ours."""
    program = f"def f(x):\n    a = []\n    for _ in range({depth}): a = [a]\n    return a"
    assert score(strict, program, tests).detail.startswith("wrong_answer: 0 of 2")


def test_a_test_that_catches_everything_is_not_passed_by_dying(partial: CodeReward) -> None:
    catching = "try:\n    y = f(1)\nexcept BaseException:\n    y = None\n"
    tests = {"kind": "asserts", "functions": ["f"], "programs": [catching]}
    assert score(partial, "def f(x): return 1", tests).value == 1
    assert score(partial, "def f(x): raise KeyError", tests).value == 1, "that is what the test allows"
    assert score(partial, "def f(x):\n    import os\n    os._exit(0)", tests).value == 0


def test_forgeable_tests_are_passed_by_no_object_that_equals_everything(strict: CodeReward) -> None:
    tests = {"kind": "asserts", "functions": ["f"], "programs": ["assert f(len) == 5"]}
    assert score(strict, "def f(g): return g('abcde')", tests).detail == "passed: 1 of 1 cases passed [forgeable]"
    assert score(strict, FORGERIES["an int equal to everything"], tests).value == 0
    assert score(strict, FORGERIES["a mock"], tests).value == 0
    assert score(strict, EVERYTHING + "def f(x): return [Everything()]", tests).value == 0


def test_the_model_does_not_choose_the_forgeable_way(strict: CodeReward) -> None:
    """Only what the tests pass before any answer decides; a function that returns objects fails in the separate process."""
    tests = {"kind": "asserts", "functions": ["f"], "programs": ["assert f(f(1)) == 1"]}
    result = score(strict, "class C: pass\ndef f(x): return C() if x == 1 else 1", tests)
    assert result.value == 0 and "[forgeable]" not in result.detail, result


# ---------------------------------------------------------------- faults of the data, and of the sandbox


@pytest.mark.parametrize(
    ("tests", "says"),
    [
        ({**ASSERTS, "programs": ["assert f(1 == 1"]}, "its tests do not run: "),
        ({**ASSERTS, "setup": "import no_such_module"}, "its tests never call f: ModuleNotFoundError"),
        ({**ASSERTS, "programs": ["assert True"]}, "its tests never call f: they passed without it"),
        ({**ASSERTS, "programs": ["while True: pass"]}, "its tests do not run: "),
        ({**ASSERTS, "programs": ["f(map(f, [f(1)]))"], "functions": ["f"]}, "need live objects"),
        ({**ASSERTS, "programs": ["import time\nassert f(time.time_ns()) == 1"]}, "must be deterministic"),
        ({"kind": "nothing"}, "tests.kind is 'nothing'"),
    ],
)
def test_tests_that_cannot_be_run_leave_the_completion_unscored(box: Sandbox, tests: dict[str, Any], says: str) -> None:
    reward = CodeReward(cpu_s=0.5, box=box)
    with pytest.raises(TestsError, match=says):
        score(reward, "def f(x): return 1", tests)
    result = call(reward, completion("```\ndef f(x): return 1\n```"), problem(tests))
    assert math.isnan(result.value) and result.outcome is Outcome.error and "TestsError" in result.detail


class Flaky:
    """A sandbox that fails so many times before it works."""

    def __init__(self, box: Sandbox, failures: int) -> None:
        self._box, self.failures = box, failures

    def _fail(self) -> None:
        if self.failures:
            self.failures -= 1
            raise SandboxError("the worker died")

    def run(self, source: str, stdin: bytes = b"", *, limits: Limits | None = None) -> Execution:
        self._fail()
        return self._box.run(source, stdin, limits=limits)

    def call(self, source: str, function: str, arguments: Any, *, limits: Limits | None = None) -> Call:
        self._fail()
        return self._box.call(source, function, arguments, limits=limits)


@pytest.mark.parametrize("tests", [STDIN, CALLS, ASSERTS], ids=["stdin", "call", "asserts"])
def test_a_failure_of_the_sandbox_is_tried_again_and_is_never_a_verdict(box: Sandbox, tests: dict[str, Any]) -> None:
    program = "def f(x): return x\n" + ("print(f(int(input())))\n" if tests is STDIN else "")
    assert score(CodeReward(box=Flaky(box, 1)), program, tests).value == 1
    result = call(CodeReward(box=Flaky(box, 2)), completion(f"```\n{program}\n```"), problem(tests))
    assert math.isnan(result.value) and result.outcome is Outcome.error and "the worker died" in result.detail


# ---------------------------------------------------------------- how the tests and the program talk


class Counting(Flaky):
    def __init__(self, box: Sandbox) -> None:
        super().__init__(box, 0)
        self.calls: list[str] = []

    def call(self, source: str, function: str, arguments: Any, *, limits: Limits | None = None) -> Call:
        self.calls.append(function)
        return super().call(source, function, arguments, limits=limits)


def test_a_completion_costs_one_run_of_the_program_and_one_of_the_tests(box: Sandbox) -> None:
    counting = Counting(box)
    reward = CodeReward(box=counting)
    for _ in range(3):
        assert score(reward, "def f(x): return x", ASSERTS).value == 1
    assert counting.calls == ["run", *["serve", "run"] * 3], "the first run of the tests is the same for all completions"


def test_each_call_that_depends_on_an_answer_takes_a_round(box: Sandbox) -> None:
    counting = Counting(box)
    tests = {**ASSERTS, "programs": ["assert f(f(f(1))) == 4"]}
    assert score(CodeReward(box=counting), "def f(x): return x + 1", tests).value == 1
    assert counting.calls == ["run", *["serve", "run"] * 3]


def test_a_loop_that_waits_for_an_answer_ends(box: Sandbox) -> None:
    tests = {**ASSERTS, "programs": ["x = 3\nwhile x != 1:\n    x = f(x)\n"]}
    assert score(CodeReward(box=box), "def f(x): return x - 1", tests).value == 1
    result = score(CodeReward(total_cpu_s=2, box=box), "def f(x): return x + 1", tests)
    assert result.outcome is Outcome.timeout and "the tests were not done after" in result.detail, result


def test_random_programs_are_judged_by_the_answers_that_the_tests_saw(strict: CodeReward) -> None:
    """The program draws other numbers in each round; the tests go on from those that they have seen."""
    program = "import random\ndef draw(): return random.SystemRandom().random()\ndef add(a, b): return a + b"
    tests = {"kind": "asserts", "functions": ["draw", "add"], "programs": ["a = draw()\nb = draw()\nassert a != b and add(a, b) == a + b"]}
    assert score(strict, program, tests).value == 1


def test_proctor_keys_tell_values_apart_but_not_the_order_of_sets() -> None:
    values: list[Any] = [1, True, 1.0, "1", b"1", None, (1,), [1], {1}, frozenset({1}), {1: 1}, [[1], 2], [[1, 2]], "", 0.0, -0.0, 10**5000]
    assert len({proctor.key(value) for value in values}) == len(values)
    assert proctor.key({8, 0, 16}) == proctor.key({16, 8, 0})
    with pytest.raises(TypeError):
        proctor.key([len])


def test_judgement_says_the_first_failure() -> None:
    cases = [Case(verdict=Verdict.passed), Case(verdict=Verdict.timeout, detail="slow"), Case(verdict=Verdict.wrong_answer, detail="no")]
    assert Judgement(cases=cases, total=5, forgeable=True).describe() == "timeout: 1 of 5 cases passed [forgeable]; case 2: slow"


# ---------------------------------------------------------------- in a recipe


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"score": "some"}, "score is 'some'; it must be one of: all, share"),
        ({"output": "floats"}, "output is 'floats'"),
        ({"tolerance": -1.0}, "tolerance is -1.0"),
        ({"cpu_s": 0}, "cpu_s is 0"),
        ({"cpu_s": 5, "total_cpu_s": 2}, "all runs together need at least the time of one"),
        ({"memory_mb": 1.5}, "memory_mb is 1.5"),
        ({"numpy": "yes"}, "numpy is 'yes'"),
    ],
)
def test_arguments_that_cannot_work(arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError) as error:
        CodeReward(**arguments)
    assert says in str(error.value)
    with pytest.raises(ValueError) as error:
        code_reward(completion("no program"), problem(STDIN), **arguments)
    assert says in str(error.value)


@pytest.mark.slow
def test_in_reward_workers() -> None:
    """Hostile and honest programs together, in the workers of a run: each gets what it is worth."""
    parts = parse_reward_config({"code": {"fn": "grpo.rewards.code.code_reward", "cpu_s": 0.5, "score": "share"}})
    programs = ["def f(x): return x", "def f(x): return 1", "def f(x):\n    while True: pass", "import os\nos.kill(os.getppid(), 9)"]
    wanted = [1.0, 0.5, 0.0, 0.0]
    with RewardRuntime(parts, num_workers=2) as runtime:
        completions = [completion(f"```python\n{program}\n```") for program in programs * 6]
        scores = runtime.score(completions, [problem(ASSERTS)] * len(completions))
    assert [score["code"].value for score in scores] == wanted * 6


def test_the_function_of_recipes_is_the_class() -> None:
    result = code_reward(completion("```\ndef f(x): return 1\n```"), problem(CALLS), score="share")
    assert result.value == 0.5
    assert parse_tests(CALLS) == parse_tests(json.dumps(CALLS))
