"""An Env with two agents."""

import verifiers.v1 as vf
from toy_sums import SumTask, SumTaskset

__all__ = ["Debate", "Two"]


class DebateConfig(vf.EnvConfig):
    pro: vf.AgentConfig = vf.AgentConfig()
    contra: vf.AgentConfig = vf.AgentConfig()


class Debate(vf.Env[DebateConfig]):
    async def run(self, task, agents):
        await agents.pro.run(task)


class Two(SumTaskset, vf.Taskset[SumTask, vf.TasksetConfig]):
    TASK = SumTask
