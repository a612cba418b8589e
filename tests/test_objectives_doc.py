"""docs/objectives.md is complete: every preset and every choice stands on it, and what it says of the presets is true."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from types import ModuleType

import pytest

from grpo import advantages, aggregation, corrections, kl, objectives, ratios
from grpo.card import objective_card
from grpo.notation import source
from grpo.plan import plan
from grpo.recipe import groups, load_recipe

PRESETS = groups()["algo"]
MODULES: list[ModuleType] = [advantages, ratios, objectives, corrections, kl, aggregation]
FUNCTIONS = [f for module in MODULES for _, f in inspect.getmembers(module, inspect.isfunction) if f.__module__ == module.__name__]
CHOICES = sorted({f.__name__ for f in FUNCTIONS if source(f)})


@pytest.fixture(scope="module")
def page(repository: Path) -> str:
    return (repository / "docs" / "objectives.md").read_text(encoding="utf-8")


def test_there_is_something_to_check() -> None:
    assert len(PRESETS) >= 12 and {"group_norm", "sequence", "cispo", "token_mask", "unbiased", "token_mean"} <= set(CHOICES)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_has_a_row_that_names_its_choices(page: str, preset: str) -> None:
    (row,) = [line for line in page.splitlines() if line.startswith(f"| `{preset}` |")]
    made = plan(load_recipe("r1_zero_arithmetic", f"algo={preset}"))
    for ref in (made.advantage, made.normalise, made.ratio, made.objective, made.kl, made.aggregation):
        if ref is not None:
            assert f"`{ref.target.rpartition('.')[2]}`" in row, f"{preset} uses {ref.target}"
    assert re.search(r"arxiv\.org/abs/\d{4}\.\d{5}|denominator", row), "its source"


@pytest.mark.parametrize("choice", CHOICES)
def test_every_choice_has_a_section_with_its_failure(page: str, choice: str) -> None:
    sections = dict(re.findall(r"^### `(\w+)`\n(.*?)(?=^##|\Z)", page, re.MULTILINE | re.DOTALL))
    assert choice in sections, f"docs/objectives.md has no section on {choice}"
    assert "*Failure*" in sections[choice] or choice in ("sequence_token", "dppo_kl"), f"{choice}: its known failure"


@pytest.mark.parametrize("preset", PRESETS)
def test_the_card_of_every_preset_holds_its_numbers_and_sources(preset: str) -> None:
    made = plan(load_recipe("r1_zero_arithmetic", f"algo={preset}"))
    card = objective_card(made)
    assert "π_{anchor}" not in card and "128 completions a step = 16 problems × 8" in card
    for ref in (made.advantage, made.ratio, made.objective, made.aggregation, *made.corrections.values()):
        assert f"`{ref.target}` – {source(ref.function())}" in card
    equations = card.split("```")[1]
    shown = {  # what the settings come to in the formula
        "clip_low": lambda v: f"{1 - v:g}" if v is not None else "clip(ρ, 0,",
        "clip_high": lambda v: f"{1 + v:g}",
    }
    for ref in (made.objective, *made.corrections.values(), made.aggregation):
        for name, value in ref.kwargs.items():
            assert shown.get(name, lambda v: f"{v:g}")(value) in equations, f"{ref.target}: {name} = {value}"
    assert ("KL " in equations) is (made.kl is not None)


def test_a_function_of_the_users_own_is_shown_by_name_and_docstring(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text('def half(rewards, group_index, *, by=2):\n    """Half of the reward."""\n    return rewards / by\n', encoding="utf-8")
    card = objective_card(plan(load_recipe("r1_zero_arithmetic", f"algo.advantage={{fn: {file}:half, by: 4}}")))
    assert "A     = half(by = 4)" in card and "Half of the reward." in card
