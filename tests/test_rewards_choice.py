"""Multiple choice: what counts as committing to a letter, and what never does."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo.rewards.choice import choice, extract_choice
from grpo.types import Completion, FinishReason, Outcome, Problem, Score

CITIES = {"A": "London", "B": "Berlin", "C": "Paris", "D": "Rome"}


def score(text: str, answer: str = "C", columns: dict[str, Any] | None = None, prompt: str = "Which?", **arguments: Any) -> Score:
    completion = Completion(
        problem_id="p", index=0, prompt_ids=(1,), token_ids=(), text=text, logprobs=(), policy_versions=(), finish_reason=FinishReason.stop
    )
    return choice(completion, Problem(id="p", prompt=prompt, answer=answer, columns=columns or {}), **arguments)


@pytest.mark.parametrize(
    "text",
    [
        # nothing but the choice
        "C",
        "c",
        "(C)",
        "(c)",
        "C.",
        "C)",
        "[C]",
        "**C**",
        "**(C)**",
        "`C`",
        "$C$",
        "Ｃ",
        "（C）",
        "Option C",
        "choice: C",
        "C. Paris",
        "(C) Paris",
        "**C) Paris**",
        "C: Paris\n",
        # a box
        r"\boxed{C}",
        r"$\boxed{C}$",
        r"\[\boxed{\text{C}}\]",
        r"\boxed{(C)}",
        r"$\boxed{\textbf{(C)}\ 12}$",
        r"So it is \boxed{C}, done.",
        r"\boxed{12} is C's value, hence \boxed{C}",
        # a statement
        "The answer is C.",
        "the answer is (C)",
        "Answer: C",
        "**Answer:** C",
        "**Answer: C**",
        "Final Answer: **(C)**",
        "The correct option is C!",
        "The correct answer would be C: Paris",
        "The best choice is therefore C.",
        "So the answer must be option C.",
        "Hence, the correct choice is:\n\nC",
        "I'd go with C.",
        "I will choose option (C).",
        "option (C) is correct",
        "C is the correct answer, since B is false.",
        "It's C.",
        "We get 12, which is (C).",
        "This corresponds to option C.",
        "答案是C",
        "答案：C。",
        "正确答案是（C）。",
        "故选C。",
        "The answer is C – Paris",
        # other letters are mentioned, or held and given up
        "The answer is C because A and B are too small.",
        "The answer is C, not B.",
        "We can rule out A.\n\nC",
        "A. London\nB. Berlin\nC. Paris\n\n(C)",
        "The answer is A. Wait, actually it's C.",
        r"\boxed{A} is wrong, so \boxed{C}",
        "A is wrong. B is wrong. Therefore C is correct.",
        "The answer is not A. The answer is C.",
        "Is the answer A? No. The answer is C.",
        "If the answer is A, we get 3. So the answer is C.",
        "Let me consider A, B and D. None works.\nAnswer: C",
        "The answer is C. I hope it is correct.",
        "Answer: A\n\nCorrection. Answer: C",
    ],
)
def test_commits_to_c(text: str) -> None:
    assert extract_choice(text) == {"C"}
    assert score(text).value == 1
    assert score(text, answer="B").value == 0
    assert score(f"<think>The answer is A.</think> <answer>{text}</answer>").value == 1
    assert score(f"<think>The answer is A.</think>\n{text}").value == 1


@pytest.mark.parametrize(
    "text",
    [
        # hedges
        "A or C",
        "A and C",
        "A/C",
        "A, C",
        "(A) or (C)",
        "**A** or **C**",
        r"\boxed{A or C}",
        r"\boxed{A, C}",
        r"\boxed{A} or \boxed{C}",
        "The answer is A or C.",
        "The answer is either C or A.",
        "The answer is C/A",
        "The answer is C, or maybe A.",
        "C, possibly A",
        "The answer is C, but it could be A.",
        "C (or A)",
        "B and C",
        "All of A, B and C",
        "C or D is right",
        "The answer is B, or perhaps C.",
        # no commitment
        "",
        "Paris",
        "AC",
        "Not C",
        "The answer is not C.",
        "The answer isn't C",
        "I would not choose C",
        "C is incorrect",
        "C is not correct",
        "The answer is C?",
        "If the answer is C, all is well.",
        "neither A nor C",
        "Vitamin C",
        "C++",
        "C = 5",
        "x is in C",
        "Options: A, B, C",
        "A. London\nB. Berlin\nC. Paris",
        "(A) 1 (B) 2 (C) 3",
        "C'est la vie",
        "The answer is 12.",
        "The answer is Clear.",
        "The answer is c++.",
        # another commitment
        "The answer is A. C is wrong.",
        "The answer is C. No: the answer is B.",
        r"C? \boxed{B}",
        r"The answer is C. \boxed{D}",
        "C is wrong.\n\nB",
    ],
)
def test_is_never_right_for_c(text: str) -> None:
    assert extract_choice(text) != {"C"}
    assert score(text).value == 0
    assert score(f"<think>The answer is C.</think> <answer>{text}</answer>").value == 0


@pytest.mark.parametrize(
    ("text", "letters"),
    [
        ("Paris", "C"),
        ("paris.", "C"),
        ("**Paris**", "C"),
        (r"\boxed{\text{Paris}}", "C"),
        ("The answer is Paris.", "C"),
        ("Answer: Paris", "C"),
        ("C Paris", "C"),
        ("The answer is Paris. It lies on the Seine.", "C"),
        ("First, the answer is Rome. No, the answer is Paris.", "C"),
        ("C. London", "AC"),
        ("A) Paris", "AC"),
        ("Paris or London", ""),
        ("I love Paris", ""),
        ("Not Paris", ""),
        ("The answer is not Paris.", ""),
    ],
)
def test_the_options_words_count_where_they_are_known(text: str, letters: str) -> None:
    assert extract_choice(text, "ABCD", CITIES) == set(letters)


@pytest.mark.parametrize(
    "options",
    [["London", "Berlin", "Paris", "Rome"], CITIES, {"label": ["A", "B", "C", "D"], "text": ["London", "Berlin", "Paris", "Rome"]}],
    ids=["list", "mapping", "label and text"],
)
@pytest.mark.parametrize("answer", ["C", "(C)", "c", "Paris"])
def test_options_come_from_a_column(options: Any, answer: str) -> None:
    assert score("It must be so. Answer: Paris", answer, {"choices": options}, options="choices").value == 1
    assert score("Rome", answer, {"choices": options}, options="choices").value == 0


def test_articles_and_pronouns_are_no_letters() -> None:
    assert extract_choice("The answer is A prime number") == set()
    assert extract_choice("The answer is A because it fits") == {"A"}
    assert extract_choice("The answer is I think C", "ABCDEFGHIJ") == set()
    assert extract_choice("I think the answer is I.", "ABCDEFGHIJ") == {"I"}


def test_the_detail_says_what_was_read() -> None:
    assert score("The answer is B") == Score(value=0.0, detail="B")
    assert score("The answer is B or C") == Score(value=0.0, detail="B or C")
    assert score("Hmm.") == Score(value=0.0, outcome=Outcome.wrong_format, detail="commits to no letter")
    assert score("the answer is C", prompt="Which?\n<think>").outcome is Outcome.wrong_format  # still thinking


LETTERS = st.sampled_from("ABCDE")
FORMS = st.sampled_from(["\\boxed{{{}}}", "The answer is {}.", "({})", "**{}**", "Answer: {}", "So {} is correct.", "答案是{}"])
ASIDES = ["We look at both.", "A and B are small.", "2 + 2 = 4.", "Hmm, wait.", "(see D above)", "\n", "C++ helps."]
FILLERS = st.lists(st.sampled_from(ASIDES), max_size=5)


@given(LETTERS, FORMS, FILLERS)
def test_a_statement_is_found_wherever_it_stands(letter: str, form: str, fillers: list[str]) -> None:
    stated = form.format(letter)
    assert extract_choice(" ".join([*fillers, "\n" + stated])) == {letter}


@given(LETTERS, LETTERS, st.sampled_from([" or ", "/", ", ", " and ", " or maybe "]), FORMS)
def test_two_letters_are_never_one(first: str, second: str, joint: str, form: str) -> None:
    if first != second:
        said = extract_choice(form.format(f"{first}{joint}{second}"))
        assert len(said) != 1


@given(st.text("ABCDEI()[]*$\\{}boxed answerisor.,:\n⟦⟧", max_size=200))
def test_any_text_can_be_read(text: str) -> None:
    assert extract_choice(text, "ABCDEFGHIJ") <= set("ABCDEFGHIJ")


@pytest.mark.parametrize("answer", ["F", "", "A or B", "Paris"])
def test_a_gold_answer_that_is_no_choice_is_an_error(answer: str) -> None:
    with pytest.raises(ValueError, match=r"problem 'p': the answer .* is no choice; it must be one of ABCDE"):
        score("C", answer)


@pytest.mark.parametrize("options", [None, [], "London", ["a", "b", "c", "d", "e", "f"], {"F": "Oslo"}])
def test_options_that_cannot_be_read_are_an_error(options: Any) -> None:
    with pytest.raises(ValueError, match="problem 'p': column 'choices' does not hold the options of ABCDE"):
        score("C", "C", {"choices": options}, options="choices")


@pytest.mark.parametrize("letters", ["", "A", "abc", "AAB", 4])
def test_letters_that_cannot_work(letters: Any) -> None:
    with pytest.raises(ValueError, match="letters is"):
        choice.check_arguments(letters=letters, options=None)  # type: ignore[attr-defined]
