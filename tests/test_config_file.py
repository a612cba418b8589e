"""``config.yaml`` of a run: whatever the strings are, what is read is what was written."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from grpo import config_file
from grpo.build import plain
from grpo.config import Config, ConfigError
from grpo.recipe import load_recipe, load_run

ODD = "${}\\'\"`#&*!|>%@?:,-[]~=.+_eE0123456789yesnoul \n\r\t\x85\u2028\u2029\ufeffé😀"
TEXTS = st.text(st.one_of(st.sampled_from(ODD), st.characters(exclude_categories=["Cs"])), max_size=16).filter(
    lambda text: text != "???"  # OmegaConf's word for a value that is missing; a recipe cannot have it either
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "tiny_digits" / "one"
    folder.mkdir(parents=True)
    return folder


@pytest.fixture(scope="module")
def composed() -> Config:
    return load_recipe("tiny_digits", "rollout=scripted")


@given(text=TEXTS)
@example("${question} is {question} =")
@example("\\${x}$ and \\\\${y} and ${")
@example("a\\nb \\u00e9 'c' \"d\"")
@example("null")
@example("1e3")
@example("-1.5E6")
@example("yes")
@example("2024-01-01")
@example("0x1F")
@example("\x85")
def test_any_string_comes_back_as_it_was(folder: Path, composed: Config, text: str) -> None:
    config = deepcopy(composed)
    config.data.template, config.rollout.stop = text, [text]
    config.data.problems["note"] = {"text": text, "list": [text], "number": 1e-5}
    (folder / "config.yaml").write_text(config_file.dump(plain(config)), encoding="utf-8")
    again = load_run(folder)
    assert (again.data.template, again.rollout.stop) == (text, [text])
    assert again.data.problems["note"] == {"text": text, "list": [text], "number": 0.00001}


def test_a_number_that_is_written_by_hand_is_what_it_is_in_a_recipe(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("optim: {lr: 1e-5}\nreward: {x: {scale: 2e3}}\nname: '2e3'\n")
    assert config_file.read(tmp_path / "config.yaml") == {"optim": {"lr": 0.00001}, "reward": {"x": {"scale": 2000.0}}, "name": "2e3"}


def test_others_read_it_as_plain_yaml() -> None:
    settings = {"a": "1e3", "b": "${x}", "c": [1e-5, None, True, "é", "null"]}
    assert yaml.safe_load(config_file.dump(settings)) == settings


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"run: {name: '\xff'}", r"it is not text in UTF-8 \(byte 13\)"),  # behind 13 others
        (b"run: [", "while parsing"),
        (b"[]", "it has no keys"),
        (b"", "it has no keys"),
    ],
)
def test_a_damaged_one_is_named(tmp_path: Path, content: bytes, why: str) -> None:
    (tmp_path / "config.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match=rf"^run\.resume: {tmp_path}/config\.yaml is not the configuration of a run: {why}"):
        load_run(tmp_path)
