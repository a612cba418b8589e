"""Sums with a tool server for each rollout."""

import verifiers.v1 as vf
from toy_sums import Adder, SumTask, SumTaskset

__all__ = ["Own"]


class OwnTask(SumTask):
    @classmethod
    def toolsets(cls, config):
        return [Adder(vf.ToolsetConfig())]


class Own(SumTaskset, vf.Taskset[OwnTask, vf.TasksetConfig]):
    TASK = OwnTask
