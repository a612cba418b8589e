"""Sums with three seconds for a rollout."""

import verifiers.v1 as vf
from toy_sums import SumData

__all__ = ["Timed"]


class TimedTask(vf.Task[SumData]):
    @vf.reward
    async def correct(self, trace: vf.Trace) -> float:
        return float(bool(trace.assistant_messages) and trace.last_reply == self.data.answer)


class Timed(vf.Taskset[TimedTask, vf.TasksetConfig]):
    def load(self):
        for n in range(20):
            yield TimedTask(SumData(prompt=f"{n} + 1 = ?", answer=str(n + 1), timeout={"agent": 3.0}), self.config.task)
