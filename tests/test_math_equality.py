"""Equality of answers: labelled pairs by category, and hypothesis pairs that are equal, or not, by construction."""

from __future__ import annotations

import json
from collections import defaultdict
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from grpo.rewards.math import NotUnderstood, TooLarge, check_gold, equal, exact_number

PAIRS = [json.loads(line) for line in (Path(__file__).parent / "data" / "math_pairs.jsonl").read_text(encoding="utf-8").splitlines()]
BY_CATEGORY: dict[str, list[dict[str, str | bool]]] = defaultdict(list)
for pair in PAIRS:
    BY_CATEGORY[pair["category"]].append(pair)


def same(left: str, right: str) -> bool:
    """``equal``, where what can not be read or computed equals nothing."""
    try:
        return equal(left, right)
    except (NotUnderstood, TooLarge):
        return False


@pytest.mark.parametrize("category", sorted(BY_CATEGORY))
def test_labelled_pairs_are_judged_as_labelled_in_both_directions(category: str) -> None:
    wrong = [
        (left, right)
        for pair in BY_CATEGORY[category]
        for left, right in ((pair["gold"], pair["answer"]), (pair["answer"], pair["gold"]))
        if same(str(left), str(right)) != pair["equal"]
    ]
    assert not wrong


def test_every_gold_of_the_pairs_equals_itself_and_can_be_compared() -> None:
    golds = {pair["gold"] for pair in PAIRS}
    unreadable = {gold for gold in golds if check_gold(gold) is not None}
    # a determinant that is not computed, and words with a number in them: both equal their own spelling only
    assert unreadable == {"\\begin{vmatrix} 1 & 2 \\\\ 3 & 4 \\end{vmatrix}", "\\text{Row 1}"}
    assert all(same(gold, gold) for gold in golds)


# ---- numbers


def test_exact_numbers() -> None:
    assert exact_number("-1,080.50") == Fraction(-2161, 2)  # −1080.5
    assert exact_number("2.5e-3") == Fraction(1, 400)  # 0.0025
    assert exact_number("2 3/4") == Fraction(11, 4)
    assert exact_number("0.1\\overline{6}") == Fraction(1, 6)  # 1/10 + 6/90
    assert exact_number("12.5\\%") == Fraction(1, 8)
    assert exact_number("2 5/4") is None  # not a mixed number
    assert exact_number("1,08") is None
    assert exact_number("3/0") is None
    assert exact_number("x") is None
    with pytest.raises(TooLarge):
        exact_number("1" * 4_301)
    with pytest.raises(TooLarge):
        exact_number("1e99999")


rationals = st.fractions(min_value=-(10**6), max_value=10**6, max_denominator=10**4)


def spellings(value: Fraction) -> list[str]:
    a, b = value.numerator, value.denominator
    sign = "-" if a < 0 else ""
    whole, part = divmod(abs(a), b)
    found = [
        f"{a}/{b}",
        f"\\frac{{{a}}}{{{b}}}",
        f"{sign}\\dfrac{{{abs(a)}}}{{{b}}}",
        f"({a})/({b})",
        f"${{{a} \\over {b}}}$",
        f"{2 * a}/{2 * b}",
    ]
    if part:
        found += [f"{sign}{whole} {part}/{b}", f"{sign}{whole}\\frac{{{part}}}{{{b}}}"] if whole else []
    if 10**4 % b == 0:
        scaled = abs(a) * 10**4 // b
        decimal = f"{sign}{scaled // 10**4}.{scaled % 10**4:04}"
        found += [
            decimal,
            f"{decimal}0",
            f"{sign}{scaled}e-4",
            f"{sign}{scaled} \\times 10^{{-4}}",
            f"{sign}{scaled // 10**4:,}.{scaled % 10**4:04}",
        ]
    if b == 1:
        found += [str(a), f"{a}.", f"{a:,}", f"{a:,}".replace(",", "{,}"), f"\\text{{{a}}}", f"{a}.0"]
    return found


@given(rationals, rationals)
@settings(max_examples=30, deadline=None)
def test_numbers_are_compared_exactly_in_any_spelling(a: Fraction, b: Fraction) -> None:
    for left in spellings(a):
        assert all(same(left, other) for other in spellings(a))
        for right in spellings(b):
            assert same(left, right) == same(right, left) == (a == b)


@given(st.integers(0, 999), st.text("0123456789", min_size=1, max_size=6))
@settings(max_examples=60, deadline=None)
def test_recurring_decimals_are_the_fractions_they_stand_for(whole: int, cycle: str) -> None:
    nines = 10 ** len(cycle) - 1  # w.(c) = w + c / (10^n − 1)
    assert same(f"{whole}.\\overline{{{cycle}}}", f"\\frac{{{whole * nines + int(cycle)}}}{{{nines}}}")
    assert not same(f"{whole}.\\overline{{{cycle}}}", f"{whole}.{cycle * 5}") or int(cycle) == 0


# ---- expressions: a tree, written down in two ways that are equal by the laws of arithmetic

LETTERS = ["x", "y", "n"]
leaves = st.one_of(
    st.sampled_from(LETTERS),
    st.integers(1, 9).map(str),
    st.sampled_from(["\\pi", "\\sqrt{2}", "\\frac{1}{2}", "e", "0.25", "\\sqrt[3]{5}", "\\alpha"]),
)
Tree = tuple  # (operator, left, right) or a leaf
trees = st.recursive(
    leaves, lambda inner: st.tuples(st.sampled_from(["+", "-", "*", "/", "^2", "sin", "sqrt"]), inner, inner), max_leaves=6
)


def plain(tree: str | Tree) -> str:
    if isinstance(tree, str):
        return tree
    operator, left, right = tree
    a, b = plain(left), plain(right)
    match operator:
        case "^2":
            return f"({a})^2"
        case "sin":
            return f"\\sin({a})"
        case "sqrt":
            return f"\\sqrt{{({a})^2+1}}"
        case "/":
            return f"\\frac{{{a}}}{{({b})^2+1}}"
    return f"({a}){operator}({b})"


def rewritten(tree: str | Tree, draw: st.DataObject) -> str:
    """The same value, by one law a node: commuted, expanded, factored, or in another notation."""
    if isinstance(tree, str):
        return draw.draw(st.sampled_from([tree, f"({tree})", f"{{{tree}}}", f"1\\cdot {tree}", f"({tree}+0)", f"\\left({tree}\\right)"]))
    operator, left, right = tree
    a, b = rewritten(left, draw), rewritten(right, draw)
    match operator:
        case "+":
            forms = [f"({b})+({a})", f"({a})-(-({b}))", f"\\frac{{2({a})+2({b})}}{{2}}"]
        case "-":
            forms = [f"-(({b})-({a}))", f"({a})+(-1)({b})", f"-({b})+({a})"]
        case "*":
            forms = [f"({b})({a})", f"({a}) \\times ({b})", f"({a})\\cdot\\left({b}\\right)", f"({a})(({b})+1)-({a})"]
        case "/":
            forms = [f"({a})/(1+({b})^2)", f"({a})\\cdot(({b})^{{2}}+1)^{{-1}}", f"\\dfrac{{-({a})}}{{-1-({b})^2}}"]
        case "^2":
            forms = [f"({a})({a})", f"(({a})-1)(({a})+1)+1", f"(-({a}))^{{2}}", f"({a})**2"]
        case "sin":
            forms = [f"\\cos\\left(\\frac{{\\pi}}{{2}}-({a})\\right)", f"-\\sin(-({a}))", f"sin({a})"]
        case _:
            forms = [f"(1+({a})^2)^{{1/2}}", f"\\sqrt{{1+({a})({a})}}", f"√(({a})^2+1)"]
    return draw.draw(st.sampled_from(forms))


@given(trees, st.data())
@settings(max_examples=120, deadline=None)
def test_a_rewritten_expression_is_equal(tree: str | Tree, data: st.DataObject) -> None:
    left, right = plain(tree), rewritten(tree, data)
    assume(len(right) < 1_500)
    assert equal(left, right)
    assert equal(right, left)


def test_an_exact_zero_is_told_from_a_tiny_number() -> None:
    assert equal("\\sqrt{2}+\\sin(\\pi)", "\\sqrt{2}") and equal("\\sqrt{2}+5\\cos(\\frac{\\pi}{2})", "\\sqrt{2}")
    assert not equal("\\sqrt{2}+\\sin(10^{-300})", "\\sqrt{2}") and not equal("\\sqrt{2}+e^{-1000}", "\\sqrt{2}")
    assert not equal("\\sqrt{2}+5\\cdot 10^{-90}\\sqrt{3}", "\\sqrt{2}") and not equal("\\sin(\\pi+10^{-200})", "0")


@given(trees, st.data())
@settings(max_examples=120, deadline=None)
def test_an_expression_with_something_added_is_not_equal(tree: str | Tree, data: st.DataObject) -> None:
    added = data.draw(st.sampled_from(["1", "\\pi", "10^{-30}", "\\frac{1}{10^{60}}", "(x^2+1)", "\\sqrt{3}"]))
    left, right = plain(tree), f"{rewritten(tree, data)}+{added}"
    assume(len(right) < 1_500)
    assert not same(left, right)
    assert not same(right, left)


@given(st.lists(st.integers(-20, 20), min_size=1, max_size=6), st.randoms())
@settings(max_examples=60, deadline=None)
def test_order_counts_in_tuples_and_not_in_lists_and_sets(values: list[int], random: object) -> None:
    shuffled = list(values)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert same(f"\\{{{', '.join(map(str, values))}\\}}", f"\\{{{','.join(map(str, shuffled + values))}\\}}")
    assert same(", ".join(map(str, values)), " \\text{ and } ".join(map(str, shuffled)))
    if len(values) > 1:
        assert same(f"({', '.join(map(str, values))})", f"\\left({' , '.join(map(str, shuffled))}\\right)") == (values == shuffled)


bounds = st.integers(-30, 30)


@given(bounds, bounds, st.booleans(), st.booleans())
@settings(max_examples=60, deadline=None)
def test_an_interval_is_its_inequality(a: int, b: int, has_low: bool, has_high: bool) -> None:
    assume(a < b)
    interval = f"{'[' if has_low else '('}{a}, {b}{']' if has_high else ')'}"
    low, high = "\\le" if has_low else "<", "\\leq" if has_high else "<"
    written = f"{a} {low} x {high} {b}"
    for other in (
        written,
        f"\\{{ x \\mid {written} \\}}",
        f"x \\in {interval}",
        f"{2 * a} {low} 2x {high} {2 * b}",
        f"{-b} {high} -x {low} {-a}",
    ):
        assert same(interval, other)
        assert same(other, interval)
    assert not same(interval, f"{a} {low} x {high} {b + 1}")
    assert not same(f"{'(' if has_low else '['}{a}, {b}{']' if has_high else ')'}", written)


@given(st.integers(2, 9), st.integers(1, 9), st.integers(1, 9), st.integers(1, 9))
@settings(max_examples=40, deadline=None)
def test_an_equation_times_a_number_says_the_same(factor: int, a: int, b: int, c: int) -> None:
    equation = f"{a}x+{b}y={c}"
    assert same(equation, f"{factor * a}x + {factor * b}y = {factor * c}")
    assert same(equation, f"{c}-{a}x={b}y")
    assert same(equation, f"y = \\frac{{{c}}}{{{b}}} - \\frac{{{a}x}}{{{b}}}")
    assert not same(equation, f"{a}x+{b}y={c + 1}")
    assert not same(equation, f"{a + 1}x+{b}y={c}")


# ---- size


def test_factorials_and_powers_up_to_the_gates_are_computed() -> None:
    assert equal("\\binom{2000}{1000}", "\\frac{2000!}{(1000!)^2}")
    assert not equal("\\binom{2000}{1000}", "\\frac{2000!}{1000!}")
    assert not equal("\\frac{1}{2004!}", "\\frac{1}{2006!}")
    assert equal("2004!", "2004 \\cdot 2003!")
    assert equal("x^{100}-1", "(x^{50}-1)(x^{50}+1)")
    assert equal("1" + "0" * 1_500, "10^{1500}")


def test_values_that_agree_to_many_digits_and_differ_are_different() -> None:
    assert not equal("\\sqrt{2}", "\\sqrt{2}+10^{-500}")
    assert not equal("x", "x+10^{-300}")
    assert not equal("\\pi", "\\pi+\\frac{1}{3^{1000}}")
    assert not equal("e^{\\pi\\sqrt{163}}", "262537412640768744")  # differs in the 31st digit


def test_roots_are_real_and_functions_are_compared_where_they_have_values() -> None:
    assert equal("\\sqrt[3]{-27}", "-3")
    assert equal("\\frac{x^2-1}{x-1}", "x+1")
    assert not equal("\\sqrt{x^2}", "x")
    assert equal("\\sqrt{-4}", "2i")
