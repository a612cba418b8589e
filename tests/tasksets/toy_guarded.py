"""Sums with a hook that forbids one of the tool's calls."""

import verifiers.v1 as vf
from toy_sums import Adder, SumTask, SumTaskset

__all__ = ["Guarded"]


class GuardedTask(SumTask):
    @vf.intercept
    async def guard(self, request: vf.Request) -> vf.Request | None:
        last = request.messages[-1]
        if last.role != "tool" or last.name != "calc_process":
            return None
        return request.model_copy(update={"messages": [*request.messages[:-1], last.model_copy(update={"content": "not allowed"})]})


class Guarded(SumTaskset, vf.Taskset[GuardedTask, vf.TasksetConfig]):
    TASK = GuardedTask

    def toolsets(self, config):
        return [Adder(vf.SharedToolsetConfig())]
