"""A run that is gone on with after something has changed: what was typed is a decision, what changed under it is refused or said."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

from grpo import checkpoint
from grpo.run import RunFolder

from .killable_runs import Kill
from .workshop import ENGINES, Workshop

HF = ENGINES["hf"]


def contents(run: RunFolder) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in run.path.rglob("*") if file.is_file()}


@pytest.fixture(scope="module")
def three_steps(workshop: Workshop) -> RunFolder:
    assert workshop.train("three", *HF, "run.steps=3", "eval.problems=0") == 0, workshop.said()
    return RunFolder.open(workshop.path("three"))


def copy(workshop: Workshop, of: RunFolder, name: str) -> RunFolder:
    shutil.copytree(of.path, workshop.path(name))
    return RunFolder.open(workshop.path(name))


def test_fewer_steps_than_it_has_are_refused(workshop: Workshop, three_steps: RunFolder) -> None:
    run = copy(workshop, three_steps, "fewer")
    before = contents(run)
    assert workshop.go_on("fewer", "run.steps=1") == 1
    assert workshop.said() == "grpo: run.steps: is 1, and this run has made 3 already\n  → raise it to go on\n"
    assert contents(run) == before


@pytest.mark.parametrize(
    ("name", "word", "says"),
    [
        (
            "sgd",
            "optim.name=sgd",
            "grpo: optim.name: is sgd, and this run has begun with adamw: its state is of no use to sgd",
        ),
        ("wider", "model.path=./wider", "grpo: model.path: names another model than this run has trained: "),
    ],
)
def test_what_its_state_does_not_fit_is_refused_by_name_and_not_kept(
    workshop: Workshop, three_steps: RunFolder, name: str, word: str, says: str
) -> None:
    run = copy(workshop, three_steps, name)
    make_wider(workshop.folder / "wider", yaml.safe_load(run.config_file.read_text())["model"]["path"])
    before = run.config_file.read_text(), run.objective_file.read_text()
    assert workshop.go_on(name, "run.steps=5", word) == 1
    assert says in workshop.said() and "Traceback" not in workshop.said()
    assert (run.config_file.read_text(), run.objective_file.read_text()) == before
    assert workshop.go_on(name, "run.steps=4") == 0, workshop.said()


def make_wider(folder: Path, model: str) -> None:
    """The tiny model with layers of another width."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    config = AutoConfig.from_pretrained(model)
    config.intermediate_size += 8
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(model).save_pretrained(folder)


def test_a_setting_of_the_optimiser_is_in_force(workshop: Workshop, three_steps: RunFolder) -> None:
    """AdamW shrinks every weight by lr · weight_decay = 1e-3 · 1000 = 1 before its step, of 1e-3 at most but for ε: so they are small."""
    run = copy(workshop, three_steps, "decay")
    assert workshop.go_on("decay", "run.steps=4", "optim.weight_decay=1000") == 0, workshop.said()
    state = checkpoint.load(run, 4)["policy"]
    assert state["optimiser"]["param_groups"][0]["weight_decay"] == 1000
    assert max(float(master.abs().max()) for master in state["masters"].values()) < 0.01
    assert max(float(master.abs().max()) for master in checkpoint.load(run, 3)["policy"]["masters"].values()) > 0.5


def test_a_prompt_with_a_reference_in_it_can_be_gone_on_with(workshop: Workshop) -> None:
    template = r"data.template='\${question} is {question} ='"
    assert workshop.train("dollar", *HF, "run.steps=1", "eval.problems=0", template) == 0, workshop.said()
    run = RunFolder.open(workshop.path("dollar"))
    assert yaml.safe_load(run.config_file.read_text())["data"]["template"] == "${question} is {question} ="
    assert workshop.go_on("dollar", "run.steps=2") == 0, workshop.said()
    assert workshop.runs.run("replay", str(run.path)) == 0, workshop.said()
    first = run.read_rollouts(2).to_pylist()[0]
    question = first["prompt"].removeprefix("$").partition(" is ")[0]
    assert question and first["prompt"] == f"${question} is {question} ="


# ---------------------------------------------------------------- files under a run


def test_another_reward_under_a_run_is_refused(workshop: Workshop, three_steps: RunFolder) -> None:
    run, file = copy(workshop, three_steps, "reward"), workshop.folder / "my_rewards.py"
    original, before = file.read_text(), contents(run)
    try:
        file.write_text(original.replace("sum(", "2 * sum("))
        assert workshop.go_on("reward", "run.steps=4") == 1
        assert workshop.said() == (
            f"grpo: run.exact: this run would not go on to the same bits: {file} was edited\n"
            "  → put back what it was; or go on all the same: run.exact=false\n"
        )
        assert contents(run) == before
        assert workshop.go_on("reward", "run.steps=4", "run.exact=false") == 0, workshop.said()
        assert f"grpo: warning: {file} was edited: from here on the bits may be others" in workshop.said()
        assert workshop.go_on("reward", "run.steps=5") == 0, "what it was gone on with is what it is held against"
    finally:
        file.write_text(original)


def write_sums(file: Path, first: int) -> None:
    file.write_text("".join(json.dumps({"question": f"{i} + 1", "answer": str(i + 1)}) + "\n" for i in range(first, first + 20)))


def test_other_problems_under_a_run_are_refused_and_others_that_are_typed_are_not(workshop: Workshop) -> None:
    data, other = workshop.folder / "data.jsonl", workshop.folder / "other.jsonl"
    write_sums(data, 0)
    write_sums(other, 100)
    words = (*HF, "eval.problems=0", "run.steps=4", f"data.problems={{fn: grpo.data.jsonl, train: {data}, heldout: {data}}}")
    assert workshop.train("data", *words, kill=Kill(phase="row", call=3, share=1)) == -9, workshop.said()
    write_sums(data, 50)
    assert workshop.go_on("data") == 1
    assert workshop.said().startswith("grpo: run.exact: this run would not go on to the same bits: the train problems are others\n")
    write_sums(data, 0)
    run = RunFolder.open(workshop.path("data"))
    for steps, word in enumerate([f"data.problems.train={other}", "run.seed=7", "optim.lr=1e-4"], start=4):
        assert workshop.go_on("data", f"run.steps={steps}", word) == 0, workshop.said()
        assert "warning" not in workshop.said()
    kept = yaml.safe_load(run.config_file.read_text())
    assert (kept["data"]["problems"]["train"], kept["run"]["seed"], kept["optim"]["lr"]) == (str(other), 7, 1e-4)
    assert all(row["problem_id"].startswith("train/") for row in run.read_rollouts(6).to_pylist())


def test_problems_in_a_chat_template_are_watched_too(workshop: Workshop, tiny_model: str) -> None:
    from transformers import AutoTokenizer

    model, data = workshop.folder / "chat", workshop.folder / "chat.jsonl"
    shutil.copytree(tiny_model, model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = "{% for m in messages %}<{{ m.content }}>{% endfor %}"
    tokenizer.save_pretrained(model)
    write_sums(data, 0)
    words = (f"model.path={model}", "data.chat=true", f"data.problems={{fn: grpo.data.jsonl, train: {data}, heldout: {data}}}")
    assert workshop.train("chat", *HF, "run.steps=1", "eval.problems=0", *words) == 0, workshop.said()
    run = RunFolder.open(workshop.path("chat"))
    for row in run.read_rollouts(1).to_pylist():
        first = int(row["problem_id"].removeprefix("train/"))
        assert row["prompt"] == f"<{first} + 1 =>"
    write_sums(data, 50)
    assert workshop.go_on("chat", "run.steps=2") == 1
    assert "the train problems are others" in workshop.said()


def test_where_no_bits_are_promised_it_is_a_warning(workshop: Workshop) -> None:
    file = workshop.folder / "my_rewards.py"
    assert workshop.train("lax", *HF, "run.steps=1", "eval.problems=0", "rollout.max_staleness=1") == 0, workshop.said()
    original = file.read_text()
    try:
        file.write_text(original + "\n# edited\n")
        assert workshop.go_on("lax", "run.steps=2") == 0, workshop.said()
        assert f"grpo: warning: {file} was edited since the steps that this run goes on from\n" in workshop.said()
    finally:
        file.write_text(original)
