"""``math_equal``: the same comparison, safe on anything, from any thread of any program.

What takes no more than microseconds – the same text, two numbers – is decided here. The rest crosses to a worker process, which is
killed if it overstays, and replaced by one that is warm already (``grpo.rewards.runtime``). One runtime a process, started when it is
first needed, and never shared with a process forked later.
"""

from __future__ import annotations

import atexit
import os
import threading
from functools import lru_cache

from grpo.imports import FunctionRef
from grpo.rewards.base import RewardPart
from grpo.rewards.math.compare import at_once
from grpo.rewards.math.extract import extract_answer
from grpo.rewards.math.limits import MAX_CHARS, TooLarge
from grpo.rewards.math.reward import accuracy, compare_answer
from grpo.rewards.runtime import RewardRuntime
from grpo.types import Completion, FinishReason, Outcome, Problem, Score

_CPU_S = 1.5  # of one comparison; ordinary ones take a millisecond
_MEMORY_MB = 512
_CACHED = 16_384
_MOST_CHARS = 2 * MAX_CHARS


def math_equal(gold: str, completion: str) -> bool:
    r"""Whether a completion gives the gold answer. Never raises for what the texts hold, and never hangs.

    ``math_equal(r"\frac{1}{2}", r"So it is \boxed{0.5}.")`` is True. What gives no answer, or one that is too large or takes too long
    to compare, is False.
    """
    answer = extract_answer(completion)
    if answer is None:
        return False
    if len(gold) + len(answer) > _MOST_CHARS:
        return gold.strip() == answer.strip()
    try:
        return _equal(gold, answer)
    except _Unsettled:
        return False


class _Unsettled(Exception):
    """The worker did not come to a verdict. Raised so that it is not cached."""


@lru_cache(maxsize=_CACHED)
def _equal(gold: str, answer: str) -> bool:
    try:
        verdict = at_once(gold, answer)
    except TooLarge:
        return False
    if verdict is not None:
        return verdict
    score = _runtime().score([_as_completion(answer)], [Problem(id="", prompt="", answer=gold)])[0]["equal"]
    if score.outcome not in (Outcome.ok, Outcome.wrong_format):
        raise _Unsettled
    return score.value == 1.0


def compare_completion(completion: Completion, problem: Problem) -> Score:
    """What the worker runs: the completion's text is the answer, extracted already."""
    return compare_answer(completion.text, problem.answer)


compare_completion.timeout_value = 0.0  # type: ignore[attr-defined]
compare_completion.memory_value = 0.0  # type: ignore[attr-defined]
compare_completion.warm_up = accuracy.warm_up  # type: ignore[attr-defined]


def _as_completion(answer: str) -> Completion:
    return Completion(
        problem_id="", index=0, prompt_ids=(0,), token_ids=(), text=answer, logprobs=(), policy_versions=(), finish_reason=FinishReason.stop
    )


_lock = threading.Lock()
_runtimes: dict[int, RewardRuntime] = {}  # by process: a forked child must not talk to its parent's workers


def _runtime() -> RewardRuntime:
    with _lock:
        found = _runtimes.get(os.getpid())
        if found is None:
            part = RewardPart(name="equal", ref=FunctionRef(target=f"{__name__}.compare_completion"), weight=1.0)
            found = _runtimes[os.getpid()] = RewardRuntime((part,), num_workers=1, cpu_s=_CPU_S, memory_mb=_MEMORY_MB)
            atexit.register(found.close)
        return found


def _forget_lock() -> None:
    """In a forked child: the lock may have been held by a thread that does not exist here."""
    global _lock
    _lock = threading.Lock()
    _equal.cache_clear()


os.register_at_fork(after_in_child=_forget_lock)
