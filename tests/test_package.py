"""What is shipped: the import names, and the wheel. (``.ci/run`` also runs the command line from the wheel.)"""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest


@pytest.mark.parametrize("name", ["rewards", "rollouts"])
def test_a_room_imported_under_its_bare_name_says_how_to_import_it(repository: Path, name: str) -> None:
    result = subprocess.run([sys.executable, "-c", f"import {name}"], cwd=repository, capture_output=True, text=True)
    assert result.returncode != 0
    assert f"ImportError: this folder was imported as '{name}'; its import name is 'grpo.{name}'" in result.stderr


@pytest.mark.parametrize("name", ["rewards", "rollouts", "recipes"])
def test_a_room_has_one_home(repository: Path, name: str) -> None:
    assert (repository / "grpo" / name).resolve() == repository / name


@pytest.mark.slow
def test_the_wheel_has_one_top_level_name_the_recipes_and_works(repository: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"  # a copy: building leaves build/ behind, and what lies there gets into the next wheel
    source.mkdir()
    for name in "pyproject.toml", "README.md", "LICENSE":
        shutil.copy(repository / name, source)
    for name in "grpo", "rewards", "rollouts", "recipes":
        shutil.copytree(repository / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    _run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(source))
    (wheel,) = tmp_path.glob("*.whl")

    with zipfile.ZipFile(wheel) as archive:
        files = set(archive.namelist())
        (top_level,) = (file for file in files if file.endswith("/top_level.txt"))
        assert archive.read(top_level).split() == [b"grpo"]
    wanted = {"grpo/py.typed"} | {f"grpo/{file.name}" for file in (repository / "grpo").glob("*.py")}
    for room in "rewards", "rollouts", "recipes":
        sources = [file for file in (repository / room).rglob("*") if file.suffix in (".py", ".yaml")]
        wanted |= {f"grpo/{file.relative_to(repository)}" for file in sources}
    assert wanted - files == set()

    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    _run(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), str(wheel))
    program = (
        f"import sys; sys.path.insert(0, {str(site)!r})\n"
        "import grpo.types, grpo.rewards, grpo.rollouts, grpo.recipes\n"
        f"assert grpo.types.__file__.startswith({str(site)!r}), grpo.types.__file__"
    )
    _run(sys.executable, "-c", program, cwd=elsewhere)


def _run(*command: str, cwd: Path | None = None) -> None:
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
