"""Run programs that a model wrote, thousands a step, so that nothing gets out of them but bytes and plain values.

>>> from grpo.rewards.sandbox import Limits, Sandbox
>>> with Sandbox(workers=2, limits=Limits(cpu_s=2)) as box:  # doctest: +SKIP
...     box.run("print(int(input()) ** 2)", stdin=b"7\\n").stdout
...     box.call("def solve(x): return x * x", "solve", [[7], [8]]).values
b'49\\n'
(49, 64)

Expected answers, checkers and verdicts stay out of it: compare what comes back with what you expected, in your own process.
What each level protects, and what it does not: ``docs/sandbox.md``.
"""

from grpo.rewards.sandbox.pool import Sandbox
from grpo.rewards.sandbox.types import Call, CallError, Execution, Limits, Plain, SandboxError, SandboxUnavailable, Status

__all__ = ["Call", "CallError", "Execution", "Limits", "Plain", "Sandbox", "SandboxError", "SandboxUnavailable", "Status"]
