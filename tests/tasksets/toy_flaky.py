"""Sums that cannot be served at first."""

import verifiers.v1 as vf
from toy_sums import SumTask, SumTaskset

__all__ = ["Flaky"]
FAILURES = ["the port is taken"]


class Flaky(SumTaskset, vf.Taskset[SumTask, vf.TasksetConfig]):
    TASK = SumTask

    def toolsets(self, config):
        if FAILURES:
            raise OSError(FAILURES.pop())
        return []
