"""Parts of completions, boxes, and words."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo.rewards.text import answer_part, boxes, column, final_part, is_blank, part_of, think_part, units, words
from grpo.types import Completion, FinishReason, Problem


@pytest.mark.parametrize(
    ("text", "think", "final", "answer"),
    [
        ("<think>a</think> <answer>b</answer>", "a", " <answer>b</answer>", "b"),
        ("just text", None, "just text", None),
        ("<answer>b</answer>", None, "<answer>b</answer>", "b"),
        ("<think>a, cut of", "a, cut of", None, None),
        ("<think>maybe <answer>1</answer> no", "maybe <answer>1</answer> no", None, None),  # never stops thinking: no answer
        ("<think>a</think> b <think>c", "a", None, None),
        ("a</think>b", "a", "b", None),  # the prompt opened it
        ("<think>a</think>b<think>c</think>d", "a</think>b<think>c", "d", None),
        ("<think>a</think><answer>1</answer><answer>2</answer>", "a", "<answer>1</answer><answer>2</answer>", "2"),
        ("<think>a</think><answer>x<answer>2</answer>", "a", "<answer>x<answer>2</answer>", "2"),
        ("<think>a</think><answer>2</answer></answer>", "a", "<answer>2</answer></answer>", "2</answer>"),
        ("<think>a</think></answer>2<answer>", "a", "</answer>2<answer>", None),
        ("", None, "", None),
    ],
)
def test_parts(text: str, think: str | None, final: str | None, answer: str | None) -> None:
    said = Completion(
        problem_id="p", index=0, prompt_ids=(1,), token_ids=(), text=text, logprobs=(), policy_versions=(), finish_reason=FinishReason.stop
    )
    problem = Problem(id="p", prompt="q", answer="")
    assert part_of(said, problem, "all") == text
    assert (part_of(said, problem, "think"), part_of(said, problem, "final"), part_of(said, problem, "answer")) == (think, final, answer)


def test_a_prompt_that_opens_the_thought() -> None:
    assert think_part("a</think>b", opened=True) == "a" and final_part("a</think>b", opened=True) == "b"
    assert think_part("cut of", opened=True) == "cut of" and final_part("cut of", opened=True) is None


@given(st.text("<>/thinkaswer ", max_size=60))
def test_parts_come_from_the_text(text: str) -> None:
    for found in (think_part(text), final_part(text), answer_part(text)):
        assert found is None or found in text


@pytest.mark.parametrize(
    ("text", "contents"),
    [
        (r"\boxed{7}", ["7"]),
        (r"\boxed {7} and \fbox{8} and \fboxed{9}", ["7", "9"]),
        (r"\boxed{\frac{1}{2}} then \boxed{\text{C}}", [r"\frac{1}{2}", r"\text{C}"]),
        (r"\boxed{\boxed{7}}", [r"\boxed{7}"]),
        (r"\boxed{\{1,2\}}", [r"\{1,2\}"]),
        (r"\boxed{7", []),
        (r"\boxed{7} \boxed{8", ["7"]),
        (r"} \boxed{7}", ["7"]),
    ],
)
def test_boxes(text: str, contents: list[str]) -> None:
    found = boxes(text)
    assert [box.content for box in found] == contents
    assert all(text[box.start : box.end].endswith(box.content + "}") and text[box.start] == "\\" for box in found)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("It's the user's turn.", ["It's", "the", "user's", "turn"]),
        ("l’équation d'Euler", ["l’équation", "d'Euler"]),
        ("x1 n_max isPrime f(x) \\frac https://a.b/c?d 3rd 42 0x1f", ["x"]),
        ("Größe Ωμέγα слово", ["Größe", "Ωμέγα", "слово"]),
        ("我们 use 计算", ["我", "们", "use", "计", "算"]),
        ("ラーメンを食べる", list("ラーメンを食べる")),
        ("한국어 단어", ["한국어", "단어"]),
        ("ＡＢＣ ｗｏｒｄ", ["ABC", "word"]),  # full width
        ("e\u0301quation", ["équation"]),  # a combining accent
        ("हिन्दी में।", ["हिन्दी", "में"]),
        ("هذا، هو؟", ["هذا", "هو"]),
        ("አማርኛ", ["አማርኛ"]),
        ("१२३ ١٢٣", []),  # digits
    ],
)
def test_words(text: str, expected: list[str]) -> None:
    assert [word.text for word in words(text)] == expected


def test_words_know_their_script_and_sentence() -> None:
    found = [(word.text, word.script, word.sentence) for word in words("One two. Три!\n四ｱአ")]
    assert found == [
        ("One", "Latin", 0), ("two", "Latin", 0), ("Три", "Cyrillic", 1), ("四", "Han", 3), ("ア", "Kana", 3), ("አ", "other", 3)
    ]  # fmt: skip


def test_units() -> None:
    assert units("The  cat\n3 + 4=7 我们go ภา") == ["the", "cat", "3", "+", "4=7", "我", "们", "go", "ภ", "า"]


@given(st.text(max_size=40))
def test_nothing_breaks_on_any_text(text: str) -> None:
    assert "".join(units(text)) == "".join(text.lower().split())
    assert all(word.text for word in words(text)) and isinstance(boxes(text), list) and is_blank(text) >= (text.strip() == "")


def test_a_column_must_be_there_and_text() -> None:
    problem = Problem(id="p7", prompt="", answer="", columns={"question": "1 + 1", "level": 3})
    assert column(problem, "question") == "1 + 1"
    with pytest.raises(ValueError, match="problem 'p7' has no column 'query'; its columns are: level, question"):
        column(problem, "query")
    with pytest.raises(ValueError, match="has a int, not text, in its column 'level'"):
        column(problem, "level")
