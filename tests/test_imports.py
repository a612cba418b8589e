"""Functions by name: import paths, files whose source travels, signatures. And that the light rooms need no heavy library."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from grpo.config import ConfigError
from grpo.imports import FunctionRef, resolve, search_path

OWN = """
from __future__ import annotations
from dataclasses import dataclass

from helper import twice

@dataclass
class Setting:
    scale: float = 1.0

def scaled(completion, problem, scale=1.0):
    return twice(Setting(scale).scale)

def anything(completion, problem, **settings):
    return len(settings)

def needs(completion, problem, *, cap):
    return cap

def one(completion):
    return 1.0

def dataset(split, *, seed, size=3):
    return [{"question": split, "answer": str(seed)}] * size

NUMBER = 3
"""


@pytest.fixture
def own(tmp_path: Path) -> Path:
    (tmp_path / "helper.py").write_text("def twice(x):\n    return 2 * x\n")
    (tmp_path / "own.py").write_text(OWN)
    return tmp_path


def error(settings: dict[str, Any], **options: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        resolve(settings, key="reward.x", **({"positional": 2} | options))
    return str(caught.value)


def test_an_import_path_with_its_arguments() -> None:
    ref = resolve({"fn": "grpo.objectives.clipped_surrogate", "clip_low": 0.1}, key="algo.objective", positional=3)
    assert ref == FunctionRef(target="grpo.objectives.clipped_surrogate", kwargs={"clip_low": 0.1})
    assert ref.load().keywords == {"clip_low": 0.1}  # type: ignore[attr-defined]
    from grpo.objectives import policy_gradient

    assert resolve({"fn": "grpo.objectives.policy_gradient"}, key="algo.objective", positional=3).load() is policy_gradient


def test_a_file_beside_its_own_imports(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(own)
    ref = resolve({"fn": "./own.py:scaled", "scale": 3}, key="reward.x", positional=2)
    assert ref.target == f"{own / 'own.py'}:scaled", "means the same from any working directory"
    assert ref.load()(None, None) == 6


def test_the_source_travels(own: Path, tmp_path: Path) -> None:
    """To a process of another machine, say: the file need not exist there."""
    (own / "alone.py").write_text("def f(completion, problem, plus=0):\n    return 40 + plus\n")
    ref = resolve({"fn": f"{own / 'alone.py'}:f", "plus": 2}, key="reward.x", positional=2)
    (own / "alone.py").unlink()
    program = "import pickle, sys; print(pickle.load(sys.stdin.buffer).load()(None, None))"
    result = subprocess.run([sys.executable, "-c", program], input=pickle.dumps(ref), capture_output=True, cwd="/")
    assert result.stdout.decode() == "42\n", result.stderr.decode()


def test_a_file_is_executed_once_and_anew_when_it_changed(tmp_path: Path) -> None:
    file = tmp_path / "counted.py"
    file.write_text("calls = []\ndef f(c, p):\n    calls.append(1)\n    return len(calls)\n")
    settings = {"fn": f"{file}:f"}
    first = resolve(settings, key="reward.x", positional=2).load()
    assert first(0, 0) == 1
    assert resolve(settings, key="reward.x", positional=2).load()(0, 0) == 2, "the same module"
    file.write_text(file.read_text().replace("len(calls)", "-len(calls)"))
    assert resolve(settings, key="reward.x", positional=2).load()(0, 0) == -1, "another content, another module"


def test_a_users_file_shadows_nothing(tmp_path: Path) -> None:
    (tmp_path / "random.py").write_text("def f(c, p):\n    import random\n    return random.Random(0).random()\n")
    (tmp_path / "json.py").write_text("raise RuntimeError('imported instead of the standard library')\n")
    import random

    assert resolve({"fn": f"{tmp_path / 'random.py'}:f"}, key="reward.x", positional=2).load()(0, 0) == random.Random(0).random()
    assert "json" in sys.modules and sys.modules["random"] is random


def test_a_process_that_is_started_finds_what_this_one_finds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From another folder; and files of the user that are called as modules of the standard library shadow these no more than here."""
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "mine.py").write_text("THREE = 3\n")
    (tmp_path / "helper.py").write_text("FOUR = 4\n")
    for name in ("types", "random"):
        (tmp_path / f"{name}.py").write_text("raise RuntimeError('a file of the user')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", "lib", *sys.path])
    environment = {**os.environ, "PYTHONPATH": search_path()}
    command = [sys.executable, "-P", "-c", "import random, types, helper, mine, pytest; print(helper.FOUR + mine.THREE)"]
    result = subprocess.run(command, env=environment, cwd="/", capture_output=True, text=True)
    assert result.stdout == "7\n", result.stderr


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({}, "reward.x.fn: is missing\n  → give an import path or `file.py:function`"),
        ({"fn": ""}, "reward.x.fn: is missing"),
        ({"fn": 3}, "reward.x.fn: is missing"),
        ({"fn": "accuracy"}, "reward.x.fn: 'accuracy' is neither an import path nor a file\n  → write"),
        ({"fn": "./own.py"}, "reward.x.fn: './own.py' names a file, and none of its functions\n  → write ./own.py:FUNCTION"),
        ({"fn": "grpo.nowhere.f"}, "reward.x.fn: cannot load 'grpo.nowhere.f': No module named 'grpo.nowhere'\n  → "),
        ({"fn": "grpo.kl.k9"}, "reward.x.fn: cannot load 'grpo.kl.k9': module 'grpo.kl' has no attribute 'k9'\n  → "),
        ({"fn": "grpo.types.__doc__"}, "reward.x.fn: 'grpo.types.__doc__' is a str, not a function\n  → "),
    ],
)
def test_what_cannot_be_a_function(settings: dict[str, Any], says: str) -> None:
    assert error(settings).startswith(says)


def test_what_is_wrong_with_a_file(own: Path) -> None:
    assert "the file" in error({"fn": f"{own / 'nowhere.py'}:f"}) and "does not exist" in error({"fn": f"{own / 'nowhere.py'}:f"})
    assert "defines no 'nothing'\n  → " in error({"fn": f"{own / 'own.py'}:nothing"})
    assert "is a int, not a function\n  → " in error({"fn": f"{own / 'own.py'}:NUMBER"})
    (own / "broken.py").write_text("def f(c, p):\n    return (\n")
    assert "failed while it was imported: SyntaxError" in error({"fn": f"{own / 'broken.py'}:f"})
    (own / "raises.py").write_text("1 / 0\ndef f(c, p):\n    return 1\n")
    assert "failed while it was imported: ZeroDivisionError: division by zero\n  → " in error({"fn": f"{own / 'raises.py'}:f"})
    assert "grpo_user_raises" not in " ".join(sys.modules), "a module that failed is not kept"


def test_signatures(own: Path) -> None:
    def fn(name: str) -> str:
        return f"{own / 'own.py'}:{name}"

    assert error({"fn": fn("scaled"), "scal": 2}).startswith("reward.x.scal: ") and "did you mean 'scale'?" in error(
        {"fn": fn("scaled"), "scal": 2}
    )
    assert "it takes: completion, problem, scale" in error({"fn": fn("scaled"), "zzz": 2})
    assert "cannot be called with 2 arguments: too many positional arguments" in error({"fn": fn("one")})
    assert "missing a required argument: 'cap'" in error({"fn": fn("needs")})
    assert "multiple values for argument 'problem'" in error({"fn": fn("needs"), "cap": 1, "problem": 2})
    assert resolve({"fn": fn("needs"), "cap": 7}, key="reward.x", positional=2).load()(0, 0) == 7
    assert resolve({"fn": fn("anything"), "a": 1, "b": 2}, key="reward.x", positional=2).load()(0, 0) == 2


def test_a_module_with_the_name_of_one_of_pythons_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it is found here, workers would find Python's own."""
    (tmp_path / "this.py").write_text("def f(completion, problem):\n    return 1.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "this", raising=False)
    with pytest.raises(
        ConfigError, match=r"^reward\.x\.fn: '.*this\.py' has the name of a module of Python's own\n  → rename it, or"
    ):
        resolve({"fn": "this.f"}, "reward.x", 2)
    monkeypatch.delitem(sys.modules, "this")
    assert resolve({"fn": f"{tmp_path}/this.py:f"}, "reward.x", 2).kwargs == {}
    assert resolve({"fn": "math.hypot"}, "reward.x", 2).target == "math.hypot"


def test_what_the_toolkit_passes_counts_as_given(own: Path) -> None:
    settings = {"fn": f"{own / 'own.py'}:dataset", "size": 2}
    ref = resolve(settings, key="data.problems", positional=1, provided=("seed",))
    assert ref.load()("train", seed=5) == [{"question": "train", "answer": "5"}] * 2
    assert "missing a required argument: 'seed'" in error(settings, positional=1)
    assert resolve({"fn": "builtins.print"}, key="x", positional=None).load() is print


# ---------------------------------------------------------------- the arrows, by experiment

HEAVY = ("ray", "vllm", "hydra", "omegaconf", "wandb", "transformers", "datasets")
LIGHT = [
    "types",
    "config",
    "config_checks",
    "idle",
    "interrupt",
    "imports",
    "data",
    "metrics",
    "run",
    "storage",
    "batch",
    "advantages",
    "objectives",
    "corrections",
    "kl",
    "aggregation",
    "losses",
    "logprobs",
    "layouts",
    "ratios",
    "notation",
    "credit",
    "learner",
    "rollout_table",
    "show",
    "replay",
    "model_support",
    "tree_attention",
    "policy",
    "checkpoint",
    "loggers",
    "trainer",
    "models",
    "tiny",
    "environment",
    "report",
    "rollouts.base",
    "rollouts.collect",
    "rollouts.scripted",
    "rollouts.hf",
    "rollouts.sampling",
]
WITHOUT_TORCH = (
    *("types", "config", "config_checks", "idle", "imports", "interrupt", "data", "metrics", "cli", "run", "storage"),
    *("rollouts.base", "rollouts.collect"),
)
BLOCK = """
import importlib, sys
class Wall:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ImportError(f"{name} is blocked")
BLOCKED = set(sys.argv[1].split(","))
sys.meta_path.insert(0, Wall())
for module in sys.argv[2].split(","):
    importlib.import_module("grpo." + module)
"""


def import_without(blocked: tuple[str, ...], modules: list[str]) -> None:
    command = [sys.executable, "-c", BLOCK, ",".join(blocked), ",".join(modules)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def rewards(repository: Path) -> list[str]:
    files = [file.relative_to(repository).with_suffix("") for file in (repository / "rewards").rglob("*.py")]
    return sorted(".".join(file.parts) for file in files if not file.stem.startswith("__"))


def test_maths_rewards_and_trainer_import_without_the_heavy_libraries(repository: Path) -> None:
    modules = [*LIGHT, *rewards(repository)]
    assert {"rewards.base", "rewards.math.reward", "rewards.runtime", "rewards.worker", "rewards.code.reward"} <= set(modules)
    import_without(HEAVY, modules)


def test_types_configuration_rewards_and_command_line_import_without_torch(repository: Path) -> None:
    import_without((*HEAVY, "torch"), [*WITHOUT_TORCH, *rewards(repository)])


def test_the_wall_would_be_felt() -> None:
    with pytest.raises(AssertionError, match="hydra is blocked"):
        import_without(HEAVY, ["recipe"])
