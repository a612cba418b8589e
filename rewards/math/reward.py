"""The accuracy reward of mathematics, and the check of gold answers when data is loaded."""

from __future__ import annotations

from functools import lru_cache

from grpo.rewards.math import probes
from grpo.rewards.math import syntax as s
from grpo.rewards.math.compare import equal, is_choice, read, with_sign
from grpo.rewards.math.extract import extract_answer
from grpo.rewards.math.limits import MAX_CHARS, NotUnderstood, TooLarge
from grpo.rewards.math.text import canonical
from grpo.types import Completion, Outcome, Problem, Score

_CACHED_VERDICTS = 16_384
_MOST_CACHED_CHARS = 2 * MAX_CHARS  # a longer answer is compared as text only, at once


def accuracy(completion: Completion, problem: Problem) -> Score:
    """1 if the completion's answer equals the problem's, else 0; ``wrong_format`` if it gives none, or none that can be read.

    The detail is the answer that was extracted. An answer too large to compare is wrong: that is the model's doing.
    """
    answer = extract_answer(completion.text)
    if answer is None:
        return Score(value=0.0, outcome=Outcome.wrong_format)
    return compare_answer(answer, problem.answer)


def compare_answer(answer: str, gold: str) -> Score:
    """``accuracy`` of an answer that is extracted already."""
    judge = _verdict if len(answer) + len(gold) <= _MOST_CACHED_CHARS else _verdict.__wrapped__
    verdict = judge(gold, answer)
    if verdict is None:
        return Score(value=0.0, outcome=Outcome.wrong_format, detail=answer)
    return Score(value=float(verdict), detail=answer)


def _warm_up() -> None:
    import sympy  # noqa: F401 – half a second, paid before the first task


accuracy.timeout_value = 0.0  # type: ignore[attr-defined]  # an answer that takes too long to compare is the model's doing: wrong
accuracy.memory_value = 0.0  # type: ignore[attr-defined]  # or too much memory
accuracy.warm_up = _warm_up  # type: ignore[attr-defined]


@lru_cache(maxsize=_CACHED_VERDICTS)
def _verdict(gold: str, answer: str) -> bool | None:
    """Whether they are equal; None if the answer can not be read."""
    try:
        return equal(gold, answer)
    except NotUnderstood:
        return None
    except (TooLarge, RecursionError, MemoryError, OverflowError):
        return False


def check_gold(answer: str) -> str | None:
    """Why this gold answer can not be compared with anything but its own spelling; None if it can. For use when data is loaded."""
    if not answer.strip():
        return "the answer is empty"
    try:
        if len(answer) > 2 * MAX_CHARS:
            raise TooLarge(f"{len(answer)} characters; at most {2 * MAX_CHARS} are read")
        text = canonical(answer)
        if not text:
            return f"the answer {_shown(answer)} is empty but for spaces and signs of LaTeX"
        for node in () if is_choice(text) else read(text):
            for part in s.walk(with_sign(node, 1)):
                if isinstance(part, (s.Sum, s.Product, s.Power, s.Call, s.Series)) and s.is_expression(part):
                    probes.equal(part, s.MINUS_ONE)
                    break
    except (NotUnderstood, TooLarge) as error:
        return f"the answer {_shown(answer)} can not be compared: {error}"
    return None


def _shown(answer: str) -> str:
    return repr(answer if len(answer) <= 80 else answer[:79] + "…")
