"""Sums whose Env never comes to its start's end."""

import asyncio

import verifiers.v1 as vf
from toy_sums import SumTask, SumTaskset

__all__ = ["Stuck", "Stucks"]
STARTED, CANCELLED = [], []


class StuckConfig(vf.EnvConfig):
    agent: vf.AgentConfig = vf.AgentConfig()


class Stuck(vf.Env[StuckConfig]):
    async def run(self, task, agents):
        await agents.agent.run(task)

    async def start(self):
        STARTED.append(1)
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            CANCELLED.append(1)
            raise


class Stucks(SumTaskset, vf.Taskset[SumTask, vf.TasksetConfig]):
    TASK = SumTask
