"""What exact resume rests on beside the settings: the words to go back by, and what the settings name and do not hold."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import pytest

from grpo.conditions import REMEDIES, check_conditions, inputs
from grpo.config import Config, ConfigError
from grpo.imports import FunctionRef
from grpo.recipe import load_recipe
from grpo.types import Problem


def made_with(files: Mapping[str, str] | None = None, exact: bool = True, **changes: Any) -> dict[str, Any]:
    conditions = {
        "exact": exact, "engine": "vllm", "schedule": "fixed", "num_engines": 1, "cpus_per_engine": 2, "trainer_threads": 2,
        "ranks": 1, "device": "cpu", "precision": "float32", "cpu_instructions": "AVX512",
    }  # fmt: skip
    return {"conditions": conditions | changes, "packages": {}, "cpu": "", "inputs": {"files": files or {}}}


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
    before, now = made_with({"/a.py": "1", "/b.py": "1"}), made_with({"/a.py": "2", "/b.py": "1"})
    said = r"^run\.exact: this run would not go on to the same bits: /a\.py was edited\n  → put back what it was; or go on all"
    with pytest.raises(ConfigError, match=said):
        check_conditions(before, now, exact=True)
    assert check_conditions(before, now, exact=False) == ["/a.py was edited: from here on the bits may be others"]
    before, now = made_with({"/a.py": "1"}, exact=False), made_with({"/a.py": "2"}, exact=False)
    assert check_conditions(before, now, exact=True) == ["/a.py was edited since the steps that this run goes on from"]


def test_what_a_setting_brings_or_takes_is_no_edit() -> None:
    assert check_conditions(made_with({"/a.py": "1"}), made_with({"/b.py": "1"}), exact=True) == []
    older = {name: value for name, value in made_with().items() if name != "inputs"}
    assert check_conditions(older, made_with({"/b.py": "1"}), exact=True) == [], "a run of a version that kept none"


def problems(question: str = "1 + 1", **columns: Any) -> list[Problem]:
    return [Problem(id="train/0", prompt=f"{question} =", answer="2", columns={"question": question, **columns})]


def of(config: Config, train: list[Problem], heldout: list[Problem] | None = None) -> dict[str, Any]:
    return made_with() | {"inputs": inputs(config, [], {"train": train, "heldout": heldout or []})}


@pytest.mark.parametrize("changed", [problems("1 + 2"), problems(tests=["f(2)"]), problems() * 2, [], problems(tests={"a", "b", "c"})])
def test_other_problems_are_noticed_unless_they_were_asked_for(changed: list[Problem]) -> None:
    was = of(Config(), problems(tests=["f(1)"]), problems("3 + 3"))
    now = of(Config(), changed, problems("3 + 3"))
    if changed:
        with pytest.raises(ConfigError, match=r"same bits: the train problems are others\n  → put back what it was"):
            check_conditions(was, now, exact=True)
    assert check_conditions(was, was, exact=True) == []
    seeded, elsewhere = Config(), Config()
    seeded.run.seed, elsewhere.data.problems = 1, {"train": "other.jsonl"}
    for config in (seeded, elsewhere):
        assert check_conditions(was, of(config, changed, problems("3 + 3")), exact=True) == [], "other settings: a decision"


def test_the_same_problems_have_one_digest_in_every_process() -> None:
    """Sets have another order in each, and objects another address."""
    program = (
        "import json; from grpo.conditions import inputs; from grpo.config import Config; from grpo.types import Problem\n"
        "class Thing: pass\n"
        "columns = {'tags': {'a', 'b', 'c', 'd', 'e'}, 'thing': Thing(), 'bytes': b'x', ('a', 1): 2, 'half': chr(0xd800)}\n"
        "print(json.dumps(inputs(Config(), [], {'train': [Problem(id='1', prompt='p', answer='a', columns=columns)], 'heldout': []})))"
    )
    said = {
        subprocess.run(
            [sys.executable, "-c", program], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        ).stdout
        for seed in ("1", "2")
    }  # fmt: skip
    assert len(said) == 1
    assert json.loads(said.pop())["problems"].keys() == {"settings", "train"}


def test_files_of_functions_are_found_wherever_they_stand() -> None:
    deep = FunctionRef(target="/b.py:g", source="B", kwargs={"scale": 2})
    functions = [FunctionRef(target="grpo.kl.k3"), {"mask": FunctionRef(target="/a.py:f", source="A", kwargs={"inner": deep})}, None]
    files = inputs(Config(), functions, {})["files"]
    assert files.keys() == {"/a.py", "/b.py"} and files["/a.py"] != files["/b.py"]
