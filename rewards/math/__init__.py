"""The math grader: take the answer out of a completion, and judge like a mathematician whether it equals the gold answer.

``extract`` (completion → answer) → ``text`` (one spelling) → ``numbers`` (exact, if it is just a number) → ``tokens`` → ``parse`` →
``syntax`` (a tree) → ``compare`` (part by part; ``reals`` for sets, ``units``) → ``evaluate`` and ``probes`` (values at points, to hundreds
of bits) → ``symbolic`` (SymPy, where numbers can not tell). Nothing that a model wrote is ever evaluated as code, and nothing is
computed before its size is known (``limits``).
"""

from grpo.rewards.math.compare import equal
from grpo.rewards.math.extract import extract_answer
from grpo.rewards.math.isolated import math_equal
from grpo.rewards.math.limits import NotUnderstood, TooLarge
from grpo.rewards.math.numbers import exact_number
from grpo.rewards.math.reward import accuracy, check_gold

__all__ = ["NotUnderstood", "TooLarge", "accuracy", "check_gold", "equal", "exact_number", "extract_answer", "math_equal"]
