"""Sums with a tool that adds: the task, and what other tasksets here are made of."""

import os

import verifiers.v1 as vf


class SumData(vf.TaskData):
    answer: str


class Adder(vf.Toolset[vf.ToolsetConfig]):
    TOOL_PREFIX = "calc"

    @vf.tool
    async def add(self, a: int, b: int) -> str:
        """Add two numbers."""
        return str(a + b)

    @vf.tool
    async def process(self) -> str:
        """Which process this is."""
        return str(os.getpid())


class SumTask(vf.Task[SumData]):
    @vf.reward(weight=2.0)
    async def correct(self, trace: vf.Trace) -> float:
        return float(trace.last_reply == self.data.answer)

    @vf.reward(weight=0.25)
    async def whole(self, trace: vf.Trace) -> float:
        return float(not trace.is_truncated)

    @vf.metric
    async def results(self, trace: vf.Trace) -> float:
        return float(len(trace.tool_messages))

    @vf.metric
    async def thought(self, trace: vf.Trace) -> float:
        return float(len(trace.assistant_messages[-1].reasoning_content or ""))


class SumTaskset:
    def load(self):
        for n in range(60):
            yield self.TASK(SumData(prompt=f"{n} + 1 = ?", system_prompt="Use the tool.", answer=str(n + 1)), self.config.task)


if __name__ == "__main__":  # verifiers runs it so, as the tools' server
    Adder.run()
