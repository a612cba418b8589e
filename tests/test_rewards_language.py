"""Language consistency. Needs the extra grpo-toolkit[language], which the development extra includes."""

from __future__ import annotations

import builtins
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo.rewards import language
from grpo.rewards.language import consistency, judged_words, prose
from grpo.types import Completion, FinishReason, Outcome, Problem, Score

THOUGHTS = {
    "en": "First, let us compute the discriminant of the quadratic. Since it is negative, there are no real roots, so we must look at the "
    "complex ones. Wait, maybe I made a mistake when I expanded the bracket; let me check again.",
    "de": "Zuerst berechnen wir die Diskriminante der quadratischen Gleichung. Da sie negativ ist, gibt es keine reellen Lösungen, also "
    "müssen wir die komplexen betrachten. Moment, vielleicht habe ich einen Fehler gemacht; ich prüfe das noch einmal.",
    "fr": "Calculons d'abord le discriminant de l'équation. Comme il est négatif, il n'y a pas de racines réelles, donc nous devons "
    "chercher les racines complexes. Attendez, j'ai peut-être fait une erreur; je vérifie encore une fois.",
    "es": "Primero calculamos el discriminante de la ecuación. Como es negativo, no hay raíces reales, así que debemos buscar las raíces "
    "complejas. Espera, quizás cometí un error; lo compruebo otra vez.",
    "ru": "Сначала вычислим дискриминант уравнения. Так как он отрицательный, действительных корней нет, поэтому нужно искать "
    "комплексные. Подождите, возможно, я ошибся; проверю ещё раз.",
    "uk": "Спочатку обчислимо дискримінант рівняння. Оскільки він від'ємний, дійсних коренів немає, тому треба шукати комплексні. "
    "Зачекайте, можливо, я помилився; перевірю ще раз.",
    "zh": "首先计算方程的判别式。因为它是负数，所以没有实数根，我们必须寻找复数根。等一下，也许我展开括号时出错了，让我再检查一遍。",
    "ja": "まず、二次方程式の判別式を計算します。負なので実数解はありません。したがって複素数解を探す必要があります。もう一度確認します。",
    "ko": "먼저 이차방정식의 판별식을 계산합니다. 음수이므로 실근이 없습니다. 따라서 복소수 근을 찾아야 합니다. 다시 확인해 보겠습니다.",
    "th": "ก่อนอื่นเราคำนวณดิสคริมิแนนต์ของสมการ เนื่องจากเป็นลบจึงไม่มีรากจริง",
    "ar": "أولا نحسب مميز المعادلة التربيعية. بما أنه سالب فلا توجد جذور حقيقية، لذلك يجب أن نبحث عن الجذور المركبة.",
    "hi": "पहले हम समीकरण का विविक्तकर निकालते हैं। चूँकि यह ऋणात्मक है, इसलिए कोई वास्तविक मूल नहीं है।",
    "el": "Πρώτα υπολογίζουμε τη διακρίνουσα της εξίσωσης. Επειδή είναι αρνητική, δεν υπάρχουν πραγματικές ρίζες.",
}


def score(thought: str, prompt: str = "1 + 1 =", columns: dict[str, Any] | None = None, **arguments: Any) -> Score:
    return raw(f"<think>{thought}</think> <answer>2</answer>", prompt, columns, **arguments)


def raw(text: str, prompt: str = "1 + 1 =", columns: dict[str, Any] | None = None, **arguments: Any) -> Score:
    completion = Completion(
        problem_id="p", index=0, prompt_ids=(1,), token_ids=(), text=text, logprobs=(), policy_versions=(), finish_reason=FinishReason.stop
    )
    return consistency(completion, Problem(id="p", prompt=prompt, answer="2", columns=columns or {}), **arguments)


@pytest.mark.parametrize("code", sorted(THOUGHTS))
def test_a_thought_is_all_in_its_language_and_in_no_other(code: str) -> None:
    """Up to the first few words: a text is taken to begin in the target language until they speak against it."""
    assert score(THOUGHTS[code], target=code).value == 1.0
    for target in set(THOUGHTS) - {code}:
        native = [word for word, is_target in judged_words(THOUGHTS[code], target) if is_target]
        assert len(native) <= 4, (target, native)


@pytest.mark.parametrize("code", sorted(THOUGHTS))
def test_auto_is_the_language_of_the_prompt(code: str) -> None:
    own = score(THOUGHTS[code], target="auto", prompt=THOUGHTS[code] + r" $\sqrt{x}$ Solve(x)")
    assert own.value == 1.0
    template = "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. User: "
    asked = {"question": THOUGHTS[code]}
    assert score(THOUGHTS[code], target="auto", prompt=template, columns=asked, question="question").value == 1.0


@pytest.mark.parametrize(
    ("thought", "target", "share"),
    [
        ("We add the numbers 我们相加", "en", 4 / 8),  # a Chinese character is a word
        ("我们需要把两个数相加 because we must", "zh", 10 / 13),
        ("We add them. Мы складываем числа.", "en", 3 / 6),
        ("まず方程式を解きます。我们需要先计算这个方程的解。", "ja", 10 / 23),  # a sentence of Chinese characters alone is Chinese
        ("我们需要先计算这个方程的解。まず方程式を解きます。", "zh", 13 / 23),
        ("計算結果。まず方程式を解きます。", "ja", 1.0),  # a short one is not, in Japanese
        ("먼저 계산합니다 then we divide", "ko", 2 / 5),
    ],
)
def test_other_scripts_are_counted_word_by_word(thought: str, target: str, share: float) -> None:
    assert score(thought, target=target).value == pytest.approx(share)


def test_a_foreign_clause_of_the_same_script_is_seen() -> None:
    """Twelve German words within some fifty English ones; the border may be off by a word."""
    clause = "also müssen wir jetzt noch die beiden komplexen Lösungen der Gleichung betrachten"
    english = THOUGHTS["en"].split(". ")
    mixed = ". ".join([*english[:2], clause, *english[2:]])
    num_english, num_german = 42, len(clause.split())
    assert score(mixed).value == pytest.approx(num_english / (num_english + num_german), abs=0.05)
    assert "müssen wir jetzt" in score(mixed).detail


@pytest.mark.parametrize(
    "symbols",
    [
        r"$x^2 + y^2 = \text{const}$",
        r"\[\int_0^1 f(x)\,dx\]",
        r"\(\alpha+\beta\)",
        r"\frac{1}{2}",
        "x_1 + n_max = 3.14",
        "ABC",
        "πr",
        "ΔABC",
        "`result = compute_sum(werte)`",
        "```python\n# eine Schleife über alle Werte\nfor wert in werte: pass\n```",
        "https://example.org/ein/langer/pfad",
        "f(x)",
        "isPrime",
        "42",
        "1st",
        r"\begin{align*} a &= b \\ c &= d \end{align*}",
        "sin(x)",
    ],
)
@pytest.mark.parametrize("target", ["en", "de", "zh", "ru"])
def test_mathematics_and_code_are_no_words(symbols: str, target: str) -> None:
    thought = f"{THOUGHTS[target]} {symbols} {THOUGHTS[target]}"
    assert score(thought, target=target) == score(f"{THOUGHTS[target]} {THOUGHTS[target]}", target=target)


@pytest.mark.parametrize(
    ("thought", "target"),
    [
        (
            "By the formula of Brahmagupta and the inequality of Cauchy and Schwarz, the distance of Herr Müller from Königsberg is least.",
            "en",
        ),
        ("We use the theorems of Pythagoras, Ramanujan and Erdős, as in Gauß, so that the sum is small.", "en"),
        ("根据 Cauchy-Schwarz 不等式和 Pythagoras 定理，再用 sin 与 log 计算，John Smith 得到答案。", "zh"),
        ("По неравенству Cauchy и теореме Euler получаем ответ.", "ru"),
        ("Nach dem Satz von Bolzano und Weierstrass, den auch Smith und Jones benutzen, folgt die Behauptung.", "de"),
    ],
)
def test_names_are_not_foreign(thought: str, target: str) -> None:
    assert score(thought, target=target).value == 1.0


@pytest.mark.parametrize(
    ("thought", "target"),
    [
        ("Please Compute The Sum Of These Two Numbers Now", "zh"),  # a run of capitalised words is no name
        ("$we must now find the sum of the numbers$", "zh"),  # a sentence is no formula
        (r"$\text{we must now find the sum of the numbers}$", "zh"),
        ("$我们需要计算这个结果$", "en"),
    ],
)
def test_words_cannot_hide(thought: str, target: str) -> None:
    assert score(thought, target=target).value == 0.0
    assert "no words" not in score(thought, target=target).detail


def test_dollars_are_not_formulas() -> None:
    assert prose("It costs $5 and then $6, not $x+1$.") == "It costs $5 and then $6, not  ."


@pytest.mark.parametrize("thought", ["", "  ", "3 + 4 = 7", "$x$", "x_1", "```\ncode\n```"])
def test_no_word_has_a_defined_value(thought: str) -> None:
    assert score(thought) == Score(value=0.0, detail="no words")
    assert score(thought, wordless=0.5).value == 0.5


def test_the_part_that_is_judged() -> None:
    text = f"<think>{THOUGHTS['de']}</think> <answer>{THOUGHTS['en']}</answer>"
    assert [raw(text, part=part).value for part in ("think", "final", "answer")] == [0.0, 1.0, 1.0]
    assert 0.3 < raw(text, part="all").value < 0.7
    assert raw(THOUGHTS["en"]) == Score(value=0.0, outcome=Outcome.wrong_format, detail="no think part")
    assert raw(THOUGHTS["en"] + "</think>", prompt="Go: <think>").value == 1.0
    assert raw(THOUGHTS["en"], prompt="Go: <think>").value == 1.0  # cut off while thinking
    assert raw("<think>" + THOUGHTS["en"]).value == 1.0


def test_names_of_languages() -> None:
    values = {score(THOUGHTS["de"], target=name).value for name in ("de", "German", "german", " DE ")}
    assert values == {1.0}
    assert "words are German" in score(THOUGHTS["de"], target="de").detail


def test_rivals_are_all_that_the_target_is_told_apart_from() -> None:
    finnish = "Ensin laskemme yhtälön diskriminantin. Koska se on negatiivinen, reaalisia juuria ei ole."
    assert score(finnish, target="fi").value == 1.0
    assert score(finnish, target="en", rivals=["fi"]).value < 0.1
    assert score(THOUGHTS["de"], target="en", rivals=[]).value == 1.0


@given(st.lists(st.sampled_from(sorted(THOUGHTS)), min_size=1, max_size=3), st.sampled_from(["en", "de", "zh", "ja", "ru"]))
@settings(max_examples=30)
def test_the_share_is_a_share_and_more_foreign_text_lowers_it(codes: list[str], target: str) -> None:
    thought = "\n".join(THOUGHTS[code] for code in codes)
    value = score(thought, target=target).value
    assert 0 <= value <= 1
    foreign = "Мы складываем числа." if target != "ru" else "먼저 계산합니다."
    assert score(f"{thought}\n{foreign}", target=target).value <= value


@given(st.text(max_size=80))
@settings(max_examples=50)
def test_any_text_can_be_judged(text: str) -> None:
    assert 0 <= score(text).value <= 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target": "Klingon"}, "the language 'Klingon' is not known; give a name or an ISO 639-1 code"),
        ({"rivals": ["ru", "de"]}, "rivals holds ru, of another script than en"),
        ({"rivals": ["de"], "target": "auto"}, "rivals is given, but target is auto"),
        ({"part": "thought"}, "part is 'thought'; it must be one of: all, think, final, answer"),
        ({"wordless": "none"}, "wordless is 'none'"),
        ({"question": ""}, "question is ''; it must be the name of a column"),
    ],
)
def test_arguments_that_cannot_work(changes: dict[str, Any], message: str) -> None:
    arguments = {"target": "en", "part": "think", "question": None, "rivals": None, "wordless": 0.0}
    with pytest.raises(ValueError, match=message):
        consistency.check_arguments(**{**arguments, **changes})  # type: ignore[attr-defined]


def test_a_prompt_without_words_cannot_name_its_language() -> None:
    with pytest.raises(ValueError, match="problem 'p' has no words to tell its language by; set target to a language"):
        score("We add.", target="auto", prompt="1 + 1 =")
    with pytest.raises(ValueError, match="problem 'p' has no column 'question'"):
        score("We add.", target="auto", question="question")


def test_without_lingua_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without_lingua(name: str, *rest: Any, **more: Any) -> Any:
        if name == "lingua":
            raise ModuleNotFoundError("No module named 'lingua'")
        return real(name, *rest, **more)

    language._languages.cache_clear()
    monkeypatch.setattr(builtins, "__import__", without_lingua)
    try:
        with pytest.raises(ValueError, match=r'run `pip install "grpo-toolkit\[language\]"`'):
            score("We add.")
    finally:
        language._languages.cache_clear()
