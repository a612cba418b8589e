"""docs/objectives.md is complete: every preset and every choice stands on it, and what it says of the presets is true."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from types import ModuleType

import pytest

from grpo import advantages, aggregation, corrections, kl, objectives, ratios
from grpo.card import objective_card
from grpo.imports import FunctionRef
from grpo.notation import formula, source, written
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
    assert "*Failure*" in sections[choice], f"{choice}: its known failure"


COLUMNS = ("preset", "advantage", "ratio", "objective", "aggregation", "kl", "source")


def row_of(page: str, preset: str) -> dict[str, str]:
    (row,) = [line for line in page.splitlines() if line.startswith(f"| `{preset}` |")]
    return dict(zip(COLUMNS, (cell.strip() for cell in row.strip("|").split("|")), strict=True))


def numbers(cell: str) -> list[float]:
    """The numbers of a cell, without those in its `names`."""
    return [float(n) for n in re.findall(r"\d+(?:\.\d+)?(?:e-\d+)?", re.sub(r"`[^`]*`", "", cell))]


def shown_numbers(objective: FunctionRef) -> list[float]:
    """What a row writes of an objective's arguments."""
    given, name = objective.kwargs, objective.target.rpartition(".")[2]
    return {
        "clipped_surrogate": lambda: [given["clip_low"], given["clip_high"]],
        "cispo": lambda: [1 + given["clip_high"]],  # as the cap of ρ
        "sapo": lambda: [given["tau_positive"], given["tau_negative"]],
        "dppo_tv": lambda: [given["delta"]],
        "policy_gradient": lambda: [],
    }[name]()


@pytest.mark.parametrize("preset", PRESETS)
def test_the_numbers_of_every_row_are_those_of_the_yaml(page: str, preset: str) -> None:
    row, made = row_of(page, preset), plan(load_recipe("r1_zero_arithmetic", f"algo={preset}"))
    algo = made.config.algo
    assert numbers(row["objective"]) == shown_numbers(made.objective)
    if made.kl is None:
        assert row["kl"] == "–" and not algo.reference_refresh
    else:
        assert numbers(row["kl"]) == [made.kl_coef, *([algo.reference_refresh] if algo.reference_refresh else [])]
        assert f"in the {algo.kl_in.value}" in row["kl"]
    assert ("to the behavior policy" in row["ratio"]) is (algo.anchor.value == "behavior")
    adds = re.search(r"; adds (.*)", row["source"])
    added = adds.group(1) if adds else ""
    rounds = made.config.rollout.sampling_rounds
    assert (f"`rollout.sampling_rounds={rounds}`" in added) is (rounds > 1)
    assert ("`overlong`" in added) is ("overlong" in made.reward_weights)
    extra = {name: ref for name, ref in made.corrections.items() if ref.target != "grpo.corrections.truncated_importance"}
    for ref in extra.values():
        assert f"`{ref.target.rpartition('.')[2]}`, δ {ref.kwargs['delta']:g}" in added
    assert not re.search("correction|mask", added) or extra


def test_every_preset_but_dppo_corrects_for_the_sampler_as_the_page_says(page: str) -> None:
    assert "All but `dppo` weigh each token by `truncated_importance` with a cap of 2" in page
    for preset in PRESETS:
        found = plan(load_recipe("r1_zero_arithmetic", f"algo={preset}")).corrections.values()
        caps = [ref.kwargs["cap"] for ref in found if ref.target == "grpo.corrections.truncated_importance"]
        assert caps == ([] if preset == "dppo" else [2.0]), preset


def test_the_papers_own_kl_of_grpo_is_given_by_the_line_in_its_row(page: str) -> None:
    (line,) = re.findall(r"`(algo\.kl[^`]*)`", row_of(page, "grpo")["source"])
    made = plan(load_recipe("r1_zero_arithmetic", "algo=grpo", *line.split()))
    assert made.kl is not None and made.kl.target == "grpo.kl.k3" and made.kl_coef == 0.04 and made.loss().needs_reference


KINDS = "policy|sampler|reward|rollout|completion|optim|time|throughput|eval"
READERS = ("console.py", "report.py")  # they name metrics that others write


def written_metrics(repository: Path) -> list[str]:
    """The names of metrics in the package's code, as patterns: what an f-string puts in may be anything."""
    files = [f for folder in ("grpo", "rollouts", "rewards") for f in (repository / folder).glob("*.py") if f.name not in READERS]
    found = {text for f in files for text in re.findall(rf'"((?:{KINDS})/[\w{{}}()./]+)"', f.read_text(encoding="utf-8"))}
    return [re.sub(r"\\{.*?\\}", r"[\\w<>]+", re.escape(text)) for text in sorted(found)]


def test_every_metric_on_the_page_is_one_that_the_code_writes(page: str, repository: Path) -> None:
    metrics = re.findall(rf"`((?:{KINDS})/[\w<>/]+)`", page)
    assert {"policy/ratio_max", "sampler/k3", "reward/<part>/mean", "sampler/<name>/weight", "rollout/drawn_groups"} <= set(metrics)
    patterns = written_metrics(repository)
    with_maximum = re.findall(
        r'if name in \(([^)]*)\):\s*metrics\[name \+ "_max"\]', (repository / "grpo/policy.py").read_text(encoding="utf-8")
    )
    assert len(with_maximum) == 1
    maxima = {name + "_max" for name in re.findall(r'"([\w/]+)"', with_maximum[0])}
    assert "`sampler/logprob_diff` (and `_max`)" in page and "sampler/logprob_diff_max" in maxima
    for metric in metrics:
        assert metric in maxima or any(re.fullmatch(p, metric) for p in patterns), f"nothing writes {metric}"
    assert not any(re.fullmatch(p, "policy/no_such_metric") for p in patterns), "a pattern that matches anything proves nothing"


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


def test_a_formula_gets_the_defaults_of_all_arguments_and_may_fail() -> None:
    @written(lambda margin: f"r + {margin:g}", "mine")
    def by_position(rewards: object, group_index: object, margin: float = 0.5) -> None: ...

    assert formula(by_position, {}) == "r + 0.5" and formula(by_position, {"margin": 2}) == "r + 2"

    @written(lambda margin: f"r + {1 / margin:g}", "mine")
    def undefined_at_0(rewards: object, group_index: object, *, margin: float = 0.0) -> None: ...

    @written(lambda other: f"r + {other}", "mine")
    def of_another_name(rewards: object, group_index: object, *, margin: float = 0.0) -> None: ...

    assert formula(undefined_at_0, {}) is None and formula(of_another_name, {}) is None


def test_a_function_of_the_users_own_whose_formula_fails_is_shown_by_name(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    formula = "from grpo.notation import written\n\n@written(lambda by: 1 / 0, 'mine')\n"
    file.write_text(formula + "def half(rewards, group_index, by=2):\n    return rewards / by\n", encoding="utf-8")
    card = objective_card(plan(load_recipe("r1_zero_arithmetic", f"algo.advantage={{fn: {file}:half, by: 4}}")))
    assert "A     = half(by = 4)" in card and "ZeroDivisionError" not in card


def test_a_function_of_the_users_own_is_shown_by_name_and_docstring(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text('def half(rewards, group_index, *, by=2):\n    """Half of the reward."""\n    return rewards / by\n', encoding="utf-8")
    card = objective_card(plan(load_recipe("r1_zero_arithmetic", f"algo.advantage={{fn: {file}:half, by: 4}}")))
    assert "A     = half(by = 4)" in card and "Half of the reward." in card
