"""Problems: the sums generator, JSON lines, prompts, and an order that goes on where it stopped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from grpo import train
from grpo.config import ConfigError
from grpo.data import ProblemSource, PromptFormat, check_disjoint, check_prompts, jsonl, load_problems, sums
from grpo.recipe import load_recipe
from grpo.types import Problem

from .tiny_runs import write_recipe


def terms_of(row: Any) -> tuple[int, ...]:
    return tuple(sorted(int(term) for term in row["question"].split(" + ")))


def problems(count: int) -> list[Problem]:
    return [Problem(id=f"p{i}", prompt=f"{i}?", answer=str(i)) for i in range(count)]


def ids(taken: list[Problem]) -> list[str]:
    return [p.id for p in taken]


# ---------------------------------------------------------------- sums


@given(
    terms=st.integers(2, 4),
    low=st.integers(0, 5),
    width=st.integers(2, 15),
    share=st.floats(0.0, 1.0),
    seeds=st.tuples(st.integers(), st.integers()),
)
def test_sums_hold_out_every_order_of_a_sum(terms: int, low: int, width: int, share: float, seeds: tuple[int, int]) -> None:
    """3 + 4 + 5 trained on would give 5 + 4 + 3 away: sorted terms, not texts, must not meet – whatever the two seeds."""
    space = (width + 1) ** terms
    heldout = max(1, int(share * min(space // 4, 300)))
    settings: dict[str, Any] = {"terms": terms, "low": low, "high": low + width, "heldout": heldout, "size": 200}
    try:
        test = sums("heldout", seed=seeds[1], **settings)
        train = sums("train", seed=seeds[0], **settings)
    except ConfigError as error:
        assert error.key == "data.problems.heldout" and space < 10_000, "a small space may have too few sums to hold out; it says so"
        return
    assert len(test) == heldout
    assert not {terms_of(row) for row in train} & {terms_of(row) for row in test}
    for row in [*train, *test]:
        numbers = terms_of(row)
        assert len(numbers) == terms and low <= numbers[0] and numbers[-1] <= low + width
        assert row["answer"] == str(sum(numbers))
    for rows in (train, test):
        assert len({row["question"] for row in rows}) == len(rows), "no row twice"


@pytest.mark.parametrize("settings", [{}, {"high": 20, "heldout": 200}, {"terms": 2, "high": 99, "heldout": 500}, {"terms": 5}])
def test_usual_sums_are_as_many_as_asked_for(settings: dict[str, Any]) -> None:
    assert len(sums("heldout", **settings)) == settings.get("heldout", 120)
    assert len(sums("train", **settings, size=300)) == 300


def test_sums_are_the_same_every_time_and_heldout_for_every_seed() -> None:
    assert sums("train", seed=3) == sums("train", seed=3)
    assert sums("train", seed=3, high=20) != sums("train", seed=4, high=20)
    assert sums("heldout", seed=3) == sums("heldout", seed=4), "runs with different seeds are scored on the same problems"
    assert len(sums("train", high=20, size=70)) == 70


def test_sums_refuse_to_hold_out_most_of_what_there_is() -> None:
    with pytest.raises(ConfigError, match=r"data\.problems\.heldout: 30 of only 36 possible sums\n  → raise high"):
        sums("train", terms=2, low=1, high=6, heldout=30)


# ---------------------------------------------------------------- JSON lines


def write(file: Path, *lines: str) -> str:
    file.write_text("\n".join(lines))
    return str(file)


def test_jsonl(tmp_path: Path) -> None:
    rows = [{"question": "1 + 1", "answer": "2", "level": 3}, {"question": "¿2 + 2?", "answer": "4", "level": 1}]
    train = write(tmp_path / "a.jsonl", json.dumps(rows[0]), "", "  ", json.dumps(rows[1], ensure_ascii=False))
    heldout = write(tmp_path / "b.jsonl", json.dumps(rows[1]))
    assert jsonl("train", train=train, heldout=heldout) == rows, "empty lines are not rows"
    assert jsonl("train", train=train, heldout=heldout, limit=1) == rows[:1]
    assert jsonl("heldout", train=train, heldout=heldout) == rows[1:]


@pytest.mark.parametrize(
    ("line", "says"),
    [('{"a": ', "line 3 is not JSON"), ("[1, 2]", "line 3 is a list, not an object"), ("12", "line 3 is a int, not an object")],
)
def test_jsonl_names_the_damaged_line(tmp_path: Path, line: str, says: str) -> None:
    file = write(tmp_path / "a.jsonl", '{"a": 1}', "", line)
    with pytest.raises(ConfigError, match=rf"data\.problems\.train: {file}, {says}.*\n  → "):
        jsonl("train", train=file, heldout=file)


def test_jsonl_that_is_not_there_or_not_text(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.problems\.heldout: the file .* does not exist .*\n  → "):
        jsonl("heldout", train="x", heldout=str(tmp_path / "nowhere.jsonl"))
    (tmp_path / "binary.jsonl").write_bytes(b'{"a": 1}\n\xff\xfe\n')
    with pytest.raises(ConfigError, match=r"data\.problems\.train: .*binary\.jsonl is not UTF-8.*\n  → "):
        jsonl("train", train=str(tmp_path / "binary.jsonl"), heldout="x")


# ---------------------------------------------------------------- rows → problems


def test_prompts_golden() -> None:
    row = {"question": "3 + 4", "answer": 7, "level": 2, "latex": r"\frac{1}{2}"}
    problem = PromptFormat(template="{level}: {question} {latex} {{x}}\n", chat=None).problem(row, "train", 5)
    assert problem == Problem(id="train/5", prompt="2: 3 + 4 \\frac{1}{2} {x}\n", answer="7", columns=row)
    assert PromptFormat().problem(row | {"id": 12}, "train", 5).id == "12"
    assert PromptFormat(prompt_key="latex", answer_key="level").problem(row, "train", 0).prompt == r"\frac{1}{2}"
    assert PromptFormat(template="{question}", chat=lambda text: f"<user>{text}</user>").problem(row, "t", 0).prompt == "<user>3 + 4</user>"


@pytest.mark.parametrize("template", ["{nope}", "{question.real.x}", "{level[a]}", "{question!z}", "{0}", "{question", "}", "{level:Q}"])
def test_a_template_that_cannot_be_filled(template: str) -> None:
    with pytest.raises(
        ConfigError, match=r"data\.template: cannot be filled with row 4 of the train split: .*\n  → its columns are question"
    ):
        PromptFormat(template=template).problem({"question": "a", "answer": "b", "level": 1}, "train", 4)


def test_a_column_that_is_not_there() -> None:
    with pytest.raises(
        ConfigError, match=r"data\.answer_key: row 0 of the heldout split has no column 'answer'\n  → its columns are: question"
    ):
        PromptFormat().problem({"question": "a"}, "heldout", 0)


def test_ids_are_unique_and_there_are_rows() -> None:
    row = {"question": "a", "answer": "b", "id": 3}
    with pytest.raises(ConfigError, match=r"two rows of the train split have the id '3'"):
        load_problems([row, row], "train", PromptFormat())
    with pytest.raises(ConfigError, match=r"the train split has no rows\n  → "):
        load_problems([], "train", PromptFormat())
    assert ids(load_problems([{"question": "a", "answer": "b"}] * 2, "train", PromptFormat())) == ["train/0", "train/1"]


def test_a_row_without_an_id_has_its_place_for_one_and_half_a_character_is_an_error() -> None:
    row = {"question": "a", "answer": "b", "id": None}
    assert ids(load_problems([row, row], "train", PromptFormat())) == ["train/0", "train/1"]
    for column, name in (("id", "id"), ("question", "prompt"), ("answer", "answer")):
        with pytest.raises(ConfigError, match=rf"the {name} of row 1 of the train split holds half a character, '\\ud83d'"):
            load_problems([row, {**row, column: "x\ud83d"}], "train", PromptFormat())


def test_prompts_that_cannot_be_sampled_are_named_before_anything_is() -> None:
    asked: list[str] = []

    def num_tokens(prompt: str) -> int:  # a character each, and one that every text begins with
        asked.append(prompt)
        return len(prompt) + 1 if prompt else 0

    rows = [Problem(id=f"p{i}", prompt="x" * length, answer="") for i, length in enumerate((3, 89, 90, 0, 50, 500))]
    with pytest.raises(ConfigError) as error:
        check_prompts(rows, "train", num_tokens, room=100, max_new_tokens=10)  # 89 + 1 + 10 is 100: it fits to the token
    said = str(error.value)
    assert "3 of 6 prompts of the train split" in said and "'p2' (91 tokens), 'p3' (0 tokens), 'p5' (501 tokens)" in said
    assert "x" * 3 not in asked, "three bytes fit, whatever their tokens are"
    check_prompts([rows[0], rows[1], rows[4]], "train", num_tokens, room=100, max_new_tokens=10)


def test_a_heldout_prompt_must_not_be_trained_on() -> None:
    check_disjoint(problems(3), [Problem(id="p0", prompt="other", answer="")])  # ids may be equal, prompts not
    with pytest.raises(ConfigError, match=r"1 of 2 held-out problems are also in the training split, e\.g\. h1"):
        check_disjoint(problems(3), [Problem(id="h0", prompt="other", answer=""), Problem(id="h1", prompt="2?", answer="")])


# ---------------------------------------------------------------- the order


@given(st.integers(1, 12), st.integers(1, 5), st.integers(0, 3))
def test_every_epoch_covers_everything_once(per_take: int, takes: int, seed: int) -> None:
    count = per_take * takes
    source = ProblemSource(problems(count), seed)
    for _ in range(3):
        epoch = [name for _ in range(takes) for name in ids(source.take(per_take))]
        assert sorted(epoch) == sorted(ids(problems(count)))


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    source, other = ProblemSource(problems(30), 0), ProblemSource(problems(30), 1)
    orders = [ids(source.take(30)), ids(source.take(30)), ids(other.take(30)), ids(problems(30))]
    assert len({tuple(order) for order in orders}) == 4


@given(st.integers(1, 9), st.lists(st.integers(1, 9), min_size=1, max_size=12), st.data())
def test_resumed_order_is_the_uninterrupted_one(count: int, sizes: list[int], data: st.DataObject) -> None:
    sizes = [min(size, count) for size in sizes]
    straight = ProblemSource(problems(count), 7)
    expected = [ids(straight.take(size)) for size in sizes]
    assert all(len(set(taken)) == len(taken) for taken in expected), "never the same problem twice in one step"
    cut = data.draw(st.integers(0, len(sizes)))
    first = ProblemSource(problems(count), 7)
    for size in sizes[:cut]:
        first.take(size)
    second = ProblemSource(problems(count), 7)
    second.position = first.position
    assert [ids(second.take(size)) for size in sizes[cut:]] == expected[cut:]


def test_more_problems_a_step_than_there_are() -> None:
    with pytest.raises(ConfigError, match=r"rollout\.problems_per_step: is 4, but the training split has only 3 problems\n  → lower it"):
        ProblemSource(problems(3), 0).take(4)


@pytest.mark.parametrize("engine", ["hf", "scripted"])
def test_a_run_does_not_start_with_a_row_that_it_could_not_sample(engine: str, tmp_path: Path, tiny_model: str) -> None:
    """Such a row, reached in the middle of a run, would end it, and every resume of it at once."""
    rows = [{"question": f"{i} + 1 =", "answer": str(i + 1)} for i in range(30)]
    rows[17]["question"] = "1" * 9_999 if engine == "hf" else ""  # nothing is too long for the scripted engine
    for name, some in (("train", rows), ("heldout", [{"question": "99 + 1 =", "answer": "100"}] * 1)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    recipe = Path(write_recipe(tmp_path, tiny_model))
    nodes = yaml.safe_load(recipe.read_text())
    nodes["defaults"] = [{"data": "jsonl"} if choice == {"data": "sums"} else choice for choice in nodes["defaults"]]
    nodes["data"] = {"problems": {name: str(tmp_path / f"{name}.jsonl") for name in ("train", "heldout")}, "template": ""}
    recipe.write_text(yaml.safe_dump(nodes, sort_keys=False))
    with pytest.raises(ConfigError, match=r"data\.problems: 1 of 30 prompts of the train split .*'train/17' \([\d,]+ tokens\)\n  → take"):
        train(load_recipe(str(recipe), f"rollout={engine}"))
