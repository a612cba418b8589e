"""Sums whose tool server all rollouts share."""

import verifiers.v1 as vf
from toy_sums import Adder, SumTask, SumTaskset

__all__ = ["Shared"]


class Shared(SumTaskset, vf.Taskset[SumTask, vf.TasksetConfig]):
    TASK = SumTask

    def toolsets(self, config):
        return [Adder(vf.SharedToolsetConfig())]
