"""The math reward: extraction, exact equality, size gates, and that nothing a model writes is ever executed."""

from __future__ import annotations

import time
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo.rewards.math import TooLarge, accuracy, check_gold, exact_number, extract_answer, math_equal
from grpo.types import Completion, FinishReason, Outcome, Problem, Score


def score(text: str, gold: str) -> Score:
    completion = Completion(
        problem_id="p", index=0, prompt_ids=(1,), token_ids=(2,), text=text, logprobs=(0.0,), policy_versions=(0,),
        finish_reason=FinishReason.stop,
    )  # fmt: skip
    return accuracy(completion, Problem(id="p", prompt="", answer=gold))


# ---- extraction


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<think>1 + 1</think> <answer>2</answer>", "2"),
        ("<think>is it \\boxed{7}?</think> <answer> 2 </answer>", "2"),  # an answer beats a box in the thought
        ("<think>x</think> <answer>so \\boxed{2}.</answer>", "2"),  # the box within the answer
        ("<think>\\boxed{7}</think> The answer is \\boxed{2}.", "2"),
        ("<answer>1</answer> no, <answer>2</answer>", "2"),
        ("<answer>1 <answer>2</answer>", "2"),
        ("<think><answer>1</answer></think> <answer>2</answer>", "2"),
        ("1 + 1 = 2</think><answer>2</answer>", "2"),  # the prompt opened the thought
        ("Maybe \\boxed{3}? No. \\boxed{5}", "5"),
        ("\\boxed{3} and then \\boxed{5", "3"),  # truncated: the last box that is closed
        ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
        ("\\boxed {\\left\\{1, 2\\right\\}}", "\\left\\{1, 2\\right\\}"),  # escaped braces are text
        ("\\boxed{\\{1}", "\\{1"),
        ("\\boxed{\\boxed{4}}", "4"),
        ("} \\boxed{4} {", "4"),
        ("the answer is 2", None),
        ("<think>\\boxed{2}</think>", None),  # thought, never said
        ("<think>\\boxed{2}", None),  # truncated within the thought
        ("<think><answer>2</answer>", None),
        ("<answer> </answer>", None),
        ("\\boxed{}", None),
        ("<answer>2", None),
        ("", None),
    ],
)
def test_extract_answer(text: str, answer: str | None) -> None:
    assert extract_answer(text) == answer


def test_extraction_is_linear_in_the_text() -> None:
    started = time.process_time()
    for hostile in ("\\boxed{" * 20_000, "<answer>" * 20_000, "<think>" * 20_000, "{" * 100_000, "\\boxed{}" * 20_000):
        assert extract_answer(hostile) is None
    assert time.process_time() - started < 2.0


# ---- equality

EQUAL = [
    ("12", "12"),
    ("12", "12.0"),
    ("12", "+12."),
    ("12", "$12$"),
    ("12", "\\$12"),
    ("12", "\\text{12}"),
    ("025", "25"),
    ("-3", "−3"),
    ("1080", "1,080"),
    ("1080", "1{,}080.00"),
    ("1080", "1,\\!080"),
    ("58500", "58\\,500"),
    ("0.5", ".5"),
    ("1/2", "0.5"),
    ("1/2", "\\frac12"),
    ("1/2", "\\dfrac{1}{2}"),
    ("1/2", "2/4"),
    ("-1/2", "\\frac{-1}{2}"),
    ("-1/2", "-\\frac{1}{2}"),
    ("5/2", "2 1/2"),
    ("5/2", "2\\frac{1}{2}"),
    ("-5/2", "-2\\frac12"),
    ("4.4e7", "44000000"),
    ("4.4e7", "4.4 \\times 10^7"),
    ("4.4e7", "4.4 \\cdot 10^{7}"),
    ("28\\%", "28.0%"),
    ("1024", "2^{10}"),
    ("1024", "2**10"),
    ("-4", "-2^2"),
    ("512", "2^{3^2}"),  # 2^9: powers associate to the right
    ("1/8", "2^{-3}"),
    ("2", "\\sqrt[3]{8}"),
    ("2\\sqrt{3}", "\\sqrt{12}"),
    ("2\\sqrt3", "2*sqrt(3)"),
    ("\\frac{\\sqrt{3}}{3}", "1/\\sqrt{3}"),
    ("\\sqrt{2}+\\sqrt{3}", "\\sqrt{5+2\\sqrt{6}}"),  # (√2 + √3)² = 5 + 2√6
    ("0", "(1+\\sqrt{2})^2-3-2\\sqrt{2}"),
    ("\\frac{\\pi}{2}", "pi/2"),
    ("2\\pi r", "\\pi r*2"),
    ("x^2+2x+1", "(x+1)^2"),
    ("x^2-1", "(x-1)(x+1)"),
    ("\\frac{x}{2}", "\\frac{1}{2}x"),
    ("3(x+1)", "3x+3"),
    ("(1, 2)", "(1,2)"),
    ("Paris", "\\text{Paris}"),
]

DIFFERENT = [
    ("1/3", "0.3333"),
    ("1/3", "0." + "3" * 40),
    ("28\\%", "28"),
    ("28\\%", "0.28"),
    ("1/2", "0.4999999"),
    ("10^{-20}", "10^{-21}"),
    ("2^{-99}", "2^{-98}"),
    ("0.0000001", "0.0000002"),
    ("\\sqrt{2}", "1.4142135623730950488016887242096980785696718753769"),
    ("\\pi", "3.14159265358979323846264338327950288"),
    ("x", "x + 10^{-40}"),
    ("x", "y"),
    ("21/2", "2 1/2"),
    ("6", "2 3"),
    ("23", "2 3"),
    ("1", "2\\frac{1}{2}"),  # not the product
    ("1234", "1, 234"),  # a list
    ("Mabel", "Amble"),  # words are not products of letters
    ("4", "4\\sqrt(2)"),
    ("x^2+1", "x^2"),
    ("5", ""),
    ("", ""),
    ("5", "\\neq 5"),
    ("5", "5 apples"),
    ("0", "1/0"),
    ("1", "0^0"),
]


@pytest.mark.parametrize(("gold", "answer"), EQUAL)
def test_equal(gold: str, answer: str) -> None:
    assert math_equal(gold, answer)
    assert math_equal(answer, gold)


@pytest.mark.parametrize(("gold", "answer"), DIFFERENT)
def test_different(gold: str, answer: str) -> None:
    assert not math_equal(gold, answer)
    assert not math_equal(answer, gold)


def test_exact_numbers() -> None:
    assert exact_number("-1,080.50") == Fraction(-2161, 2)  # −1080.5
    assert exact_number("2.5e-3") == Fraction(1, 400)  # 0.0025
    assert exact_number("2 3/4") == Fraction(11, 4)
    assert exact_number("2 5/4") is None  # not a mixed number
    assert exact_number("1,08") is None
    assert exact_number("3/0") is None
    assert exact_number("x") is None


rationals = st.fractions(min_value=-(10**6), max_value=10**6, max_denominator=10**4)


def spellings(value: Fraction) -> list[str]:
    a, b = value.numerator, value.denominator
    sign = "-" if a < 0 else ""
    decimal = [] if b not in (1, 2, 4, 5, 8, 10) else [f"{float(value):.4f}", f"{value.numerator * 10**4 // b}e-4"]
    mixed = f"{sign}{abs(a) // b} {abs(a) % b}/{b}"
    return [f"{a}/{b}", f"\\frac{{{a}}}{{{b}}}", f"{sign}\\frac{{{abs(a)}}}{{{b}}}", mixed, f"({a})/({b})", *decimal]


@given(rationals, rationals)
@settings(max_examples=60, deadline=None)
def test_numbers_are_compared_exactly_in_any_spelling(a: Fraction, b: Fraction) -> None:
    for left in spellings(a):
        assert all(math_equal(left, same) for same in spellings(a))
        for right in spellings(b):
            assert math_equal(left, right) == math_equal(right, left) == (a == b)


expressions = st.recursive(
    st.sampled_from(["x", "y", "2", "3", "\\pi", "0.5", "\\sqrt{2}"]),
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from(["+", "-", "*", "/"]), inner).map(lambda parts: f"({parts[0]}){parts[1]}({parts[2]})"),
        inner.map(lambda text: f"({text})^2"),
        inner.map(lambda text: f"\\sqrt{{{text}}}"),
        inner.map(lambda text: f"-({text})"),
    ),
    max_leaves=4,
)


@given(expressions, expressions)
@settings(max_examples=40, deadline=None)
def test_equality_is_reflexive_and_symmetric(a: str, b: str) -> None:
    assert math_equal(a, a)
    assert math_equal(a, b) == math_equal(b, a)
    if check_gold(a) is None:
        assert math_equal(a, f"(0+{a})")


# ---- size gates


@pytest.mark.parametrize(
    "text",
    [
        "9^{9^{9^{9}}}",
        "-9^{9^9}",
        "2^{10001}",
        "10^{5000}",
        "(2/3)^{10000}",
        "(x*10^{4000})^{10000}",  # SymPy multiplies out the number
        "(3^{1/2})^{9999999}",
        "10^{4000}*10^{4000}",
        "1e99999",
        "1e999999999999",
        "1e5000",
        "9" * 1_000 + "^9",
        "9" * 5_000,
        "(" * 60 + "1" + ")" * 60,
        "-" * 60 + "1",
        "x" + "^2" * 60,
        "\\sqrt" * 60 + "2",
        "+".join(["x"] * 1_500),
    ],
)
def test_what_is_too_large_is_wrong_at_once(text: str) -> None:
    started = time.process_time()
    assert score(f"\\boxed{{{text}}}", "2") == Score(value=0.0, detail=text)
    assert not math_equal("2", text)
    assert check_gold(text) is not None
    assert time.process_time() - started < 2.0


def test_numbers_up_to_the_gates_are_computed() -> None:
    assert math_equal("1" + "0" * 1_500, "10^{1500}")
    with pytest.raises(TooLarge):
        exact_number("1" * 4_301)


# ---- nothing is executed


PAYLOADS = [
    "__import__('os').system('touch {}')",
    "open('{}','w')",
    "exec(\"open('{}','w')\")",
    "[open('{}','w'),2]",
    "\\text{{__import__('os').system('touch {}')}}",
    "2+__import__('pathlib').Path('{}').touch()",
    "().__class__.__base__.__subclasses__() or open('{}','w')",
    "\\frac{{open('{}','w')}}{{2}}",
]


@pytest.mark.parametrize("payload", PAYLOADS)
def test_payloads_are_text(payload: str, tmp_path: Path) -> None:
    canary = tmp_path / "x"
    text = payload.format(canary)
    for verdict in (score(f"\\boxed{{{text}}}", "2"), score(f"<answer>{text}</answer>", "2")):
        assert verdict.value == 0.0
        assert verdict.outcome is Outcome.wrong_format
    assert not math_equal(text, "2")
    assert check_gold(text) is not None
    assert not canary.exists()


@given(st.text(alphabet="0123456789.,+-*/^(){}[]\\%$ xyesqrtpifac_'=<>", max_size=30))
@settings(max_examples=300, deadline=None)
def test_any_text_gets_a_verdict(text: str) -> None:
    assert score(f"<answer>{text}</answer>", "17").outcome in (Outcome.ok, Outcome.wrong_format)
    assert isinstance(check_gold(text), str | None)


# ---- the reward


def test_outcomes_of_accuracy() -> None:
    assert score("\\boxed{12}", "12") == Score(value=1.0, detail="12")
    assert score("\\boxed{13}", "12") == Score(value=0.0, detail="13")
    assert score("twelve", "12") == Score(value=0.0, outcome=Outcome.wrong_format)
    assert score("\\boxed{about 12 or so}", "12") == Score(value=0.0, outcome=Outcome.wrong_format, detail="about 12 or so")
    assert score("\\boxed{12}", "twelve") == Score(value=0.0, detail="12")  # a gold that cannot be read is not the model's format error


# the golds of GSM8K: integers, thousands, a few decimals and negatives
GOLDS = ["18", "3", "70000", "540", "20", "64", "260", "160", "45", "460", "366", "694", "5.00", "1,080", "-3", "2,125", "0.75", "36,000"]


@pytest.mark.parametrize("gold", GOLDS)
def test_every_gold_scores_one(gold: str) -> None:
    assert check_gold(gold) is None
    for text in (f"<think>a</think> <answer>{gold}</answer>", f"so \\boxed{{{gold}}}", f"<answer>${gold}.</answer>"):
        assert score(text, gold).value == 1.0


@pytest.mark.parametrize(("gold", "said"), [("", "empty"), ("Paris", "'Paris'"), ("(1", "')'"), ("9^{9^{9}}", "exponent")])
def test_a_gold_that_cannot_be_compared_is_named(gold: str, said: str) -> None:
    message = check_gold(gold)
    assert message is not None
    assert said in message
