"""What exact resume rests on beside the settings: the words to go back by, and what the settings name and do not hold."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from datetime import date
from decimal import Decimal
from enum import Enum
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from grpo.conditions import REMEDIES, check_conditions
from grpo.config import Config, ConfigError
from grpo.imports import FunctionRef
from grpo.inputs import digest, inputs
from grpo.parts import inputs_of
from grpo.plan import Plan, plan_without_model
from grpo.recipe import load_recipe
from grpo.rewards.base import RewardPart
from grpo.types import Problem


def made_with(functions: Mapping[str, str] | None = None, exact: bool = True, **changes: Any) -> dict[str, Any]:
    conditions = {
        "exact": exact, "engine": "vllm", "schedule": "fixed", "cpus_per_engine": 2, "trainer_threads": 2,
        "ranks": 1, "device": "cpu", "precision": "float32", "cpu_instructions": "AVX512",
    }  # fmt: skip
    return {"conditions": conditions | changes, "packages": {}, "cpu": "", "inputs": {"functions": functions or {}}}


@pytest.mark.parametrize("name", sorted(REMEDIES.keys() - {"trainer_threads", "cpu_instructions"}))
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_remedy_can_be_typed(name: str, precision: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_conditions(made_with(precision=precision), made_with(precision=precision) | {"conditions": {"exact": True}}, exact=True)
    words = str(caught.value).splitlines()[1].removeprefix("  → ").removesuffix("; or go on all the same: run.exact=false")
    (word,) = (word for word in words.split(", ") if word.startswith(REMEDIES[name].partition("{")[0]))
    load_recipe("r1_zero_arithmetic", word)


def test_the_remedy_of_threads_is_the_variable_that_torch_asks_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MKL_NUM_THREADS", "1")
    with pytest.raises(ConfigError, match=r"\n  → MKL_NUM_THREADS=2 OMP_NUM_THREADS=2 in front of the command; or"):
        check_conditions(made_with(), made_with(trainer_threads=1), exact=True)
    monkeypatch.delenv("MKL_NUM_THREADS")
    with pytest.raises(ConfigError, match=r"\n  → OMP_NUM_THREADS=2 in front of the command; or"):
        check_conditions(made_with(), made_with(trainer_threads=1), exact=True)


def test_that_variable_is_asked_first() -> None:
    """What the remedy rests on, where torch is built with MKL."""
    program = "import torch; print(torch.backends.mkl.is_available(), torch.get_num_threads())"
    environment = {"OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "1"}
    said = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True).stdout.split()
    assert said in (["True", "1"], ["False", "2"])


def test_an_edited_file_is_refused_or_said() -> None:
    before, now = made_with({"/a.py:f": "1", "/b.py:f": "1"}), made_with({"/a.py:f": "2", "/b.py:f": "1"})
    said = r"^run\.exact: this run would not go on to the same bits: /a\.py was edited\n  → put back what it was; or go on all"
    with pytest.raises(ConfigError, match=said):
        check_conditions(before, now, exact=True)
    assert check_conditions(before, now, exact=False) == ["/a.py was edited: from here on the bits may be others"]
    before, now = made_with({"/a.py:f": "1"}, exact=False), made_with({"/a.py:f": "2"}, exact=False)
    assert check_conditions(before, now, exact=True) == ["/a.py was edited since the steps that this run goes on from"]


def test_what_a_setting_brings_or_takes_is_no_edit() -> None:
    assert check_conditions(made_with({"/a.py:f": "1"}), made_with({"/b.py:f": "1"}), exact=True) == []
    older = {name: value for name, value in made_with().items() if name != "inputs"}
    assert check_conditions(older, made_with({"/b.py:f": "1"}), exact=True) == [], "a run of a version that kept none"


def from_file(name: str, source: str) -> FunctionRef:
    return FunctionRef(target=f"/my_rewards.py:{name}", source=source)


def test_a_function_that_is_typed_anew_is_a_decision_even_from_a_file_that_has_grown_by_it() -> None:
    def held(*functions: FunctionRef) -> dict[str, Any]:
        return made_with() | {"inputs": inputs(Config(), functions, {})}

    before = held(from_file("digits", "one"))
    assert check_conditions(before, held(from_file("short", "one and another")), exact=True) == []
    edited = held(from_file("digits", "one and another"), from_file("short", "one and another"))
    with pytest.raises(ConfigError, match=r"same bits: /my_rewards\.py was edited\n"):
        check_conditions(before, edited, exact=True)
    again = held(from_file("digits", "two"), from_file("short", "two"))
    assert check_conditions(edited, again, exact=False) == ["/my_rewards.py was edited: from here on the bits may be others"], "once"


def problems(question: str = "1 + 1", **columns: Any) -> list[Problem]:
    return [Problem(id="train/0", prompt=f"{question} =", answer="2", columns={"question": question, **columns})]


def of(config: Config, train: list[Problem], heldout: list[Problem] | None = None) -> dict[str, Any]:
    return made_with() | {"inputs": inputs(config, [], {"train": train, "heldout": heldout or []})}


@pytest.mark.parametrize("changed", [problems("1 + 2"), problems(tests=["f(2)"]), problems() * 2, [], problems(tests={"a", "b", "c"})])
def test_other_problems_are_noticed_unless_they_were_asked_for(changed: list[Problem]) -> None:
    was = of(Config(), problems(tests=["f(1)"]), problems("3 + 3"))
    now = of(Config(), changed, problems("3 + 3"))
    if changed:
        with pytest.raises(ConfigError, match=r"same bits: the train problems are others\n  → put back what they were \(a function"):
            check_conditions(was, now, exact=True)
    assert check_conditions(was, was, exact=True) == []
    seeded, elsewhere = Config(), Config()
    seeded.run.seed, elsewhere.data.problems = 1, {"train": "other.jsonl"}
    for config in (seeded, elsewhere):
        assert check_conditions(was, of(config, changed, problems("3 + 3")), exact=True) == [], "other settings: a decision"


def test_problems_that_are_drawn_anew_at_each_start_have_a_remedy_of_their_own() -> None:
    """What they were is gone: nobody can put it back."""
    was, now = of(Config(), problems("1 + 1"), problems("3 + 3")), of(Config(), problems("1 + 2"), problems("3 + 4"))
    remedy = (
        r"the train problems are others; the heldout problems are others\n"
        r"  → put back what they were \(a function that draws them must draw from its argument seed, or they are others at each start\); "
        r"or go on all the same: run\.exact=false$"
    )
    with pytest.raises(ConfigError, match=remedy):
        check_conditions(was, now, exact=True)


SAME_IN_EVERY_PROCESS = """
import json, sys
from dataclasses import dataclass
import numpy as np
from PIL import Image
from grpo.inputs import digest

class Thing: pass

@dataclass
class Case:
    tags: set
    thing: Thing

letters = ["a", "b", "c", "d", "e", "f", "g"]
columns = {
    "set": set(letters),
    "sets in a set": {frozenset(letters), frozenset(letters[:3])},
    "objects": {Thing(), Thing()},
    "dataclass": Case(set(letters), Thing()),
    "dict in the order of a set": {name: 1 for name in set(letters)},
    "image": Image.new("RGB", (4, 4)),
    "array of objects": np.array([Thing(), "a"], dtype=object),
    "function": len,
    "tuple": {("a", 1): 2},
    "half": chr(0xd800),
}
columns["itself"] = columns["in itself"] = columns
print(json.dumps({name: digest(value).hex() for name, value in columns.items()}))
"""


def test_what_is_the_same_has_one_digest_in_every_process() -> None:
    """The order of sets is another under each hash seed, and the place of objects in memory."""

    def said(hash_seed: str) -> dict[str, str]:
        command = [sys.executable, "-c", f"junk = [object() for _ in range({hash_seed}000)]\n{SAME_IN_EVERY_PROCESS}"]
        environment = {"PYTHONHASHSEED": hash_seed}
        found: dict[str, str] = json.loads(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)
        return found

    first = said("1")
    assert len(first) == 12 and said("2") == first


def test_the_order_of_keys_is_no_content() -> None:
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1}) != digest({"a": 2, "b": 1})
    assert digest(["a", "b"]) != digest(["b", "a"])


@dataclass
class Case:
    value: Any


class Colour(Enum):
    red = 1
    blue = 2


def in_the_middle(value: float, dtype: str = "float64") -> Any:
    array = np.zeros(5000, dtype=dtype)
    array[2500] = value
    return array


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (in_the_middle(0), in_the_middle(1)),
        (in_the_middle(1).reshape(50, 100), in_the_middle(1)),
        (in_the_middle(0, "int32"), in_the_middle(0, "float32")),
        (np.array(["a", None], dtype=object), np.array(["b", None], dtype=object)),
        (np.float32(1), np.float32(2)),
        (torch.tensor([1.0, 2.0], dtype=torch.bfloat16), torch.tensor([1.0, 2.5], dtype=torch.bfloat16)),
        (torch.tensor(1), torch.tensor(2)),
        (Image.new("L", (4, 4)), Image.new("L", (4, 4), 1)),
        (Image.new("L", (2, 8)), Image.new("L", (8, 2))),
        ({("a", 1): 1}, {("a", 1): 2}),
        ({1: "x"}, {"1": "x"}),
        (Case([1]), Case([2])),
        (Colour.red, Colour.blue),
        (date(2024, 1, 1), date(2024, 1, 2)),
        (Decimal("0.1"), Decimal("0.2")),
        (b"a", "a"),
        (1, True),
        (1, 1.0),
        ([10**5000], [10**5000 + 1]),  # too long for Python to print
        (["ab"], ["a", "b"]),
        ([["a"], "b"], [["a", "b"]]),
        (None, "None"),
    ],
)
def test_other_content_has_another_digest(one: Any, other: Any) -> None:
    assert digest({"column": one}) != digest({"column": other})
    assert digest(one) == digest(one)


def test_what_has_no_end_or_cannot_be_read_ends_no_run() -> None:
    class Broken:
        dtype, shape = "float32", (3,)

        def tobytes(self) -> bytes:
            raise OSError("the file is gone")

    row: dict[str, Any] = {"question": "1 + 1"}
    row["self"] = row
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    case = Case(None)
    case.value = [case]
    odd = {"row": row, "deep": deep, "case": case, "broken": Broken(), "meta": torch.zeros(2, device="meta")}
    was = of(Config(), problems(level=1, **odd))
    assert check_conditions(was, of(Config(), problems(level=1, **odd)), exact=True) == []
    with pytest.raises(ConfigError, match="the train problems are others"):
        check_conditions(was, of(Config(), problems(level=2, **odd)), exact=True)


def test_files_of_functions_are_found_wherever_they_stand() -> None:
    deep = FunctionRef(target="/b.py:g", source="B", kwargs={"scale": 2})
    functions = [FunctionRef(target="grpo.kl.k3"), {"mask": FunctionRef(target="/a.py:f", source="A", kwargs={"inner": deep})}, None]
    found = inputs(Config(), functions, {})["functions"]
    assert found.keys() == {"/a.py:f", "/b.py:g"} and found["/a.py:f"] != found["/b.py:g"]


def test_every_function_of_a_plan_is_looked_at() -> None:
    """But for that of the problems, which are looked at themselves: a field that is new has to be named too."""
    made = plan_without_model(load_recipe("tiny_digits"))
    names = {field.name for field in fields(Plan) if "FunctionRef" in str(field.type)} - {"problems"}
    changes: dict[str, Any] = {name: from_file(name, "text") for name in names - {"corrections"}}
    changes["corrections"] = {"mask": from_file("corrections", "text")}
    changes["rewards"] = (RewardPart(name="digits", ref=from_file("rewards", "text"), weight=1.0),)
    found = inputs_of(replace(made, **changes), ([], []))["functions"]
    assert found.keys() == {f"/my_rewards.py:{name}" for name in {*names, "rewards"}}
