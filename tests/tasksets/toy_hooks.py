"""Setup, finalize, a stop and a reward that looks into the runtime; ``broken`` names the one that is to raise."""

import verifiers.v1 as vf
from toy_sums import SumData

__all__ = ["Hooked"]


class HookedConfig(vf.TasksetConfig):
    broken: str = ""


class HookedTask(vf.Task[SumData]):
    async def setup(self, trace, runtime):
        if self.data.name == "setup":
            raise RuntimeError("no disk is left")
        await runtime.write("told.txt", b"before")

    async def finalize(self, trace, runtime):
        trace.info["told"] = (await runtime.read("told.txt")).decode()

    @vf.stop
    async def enough(self, trace: vf.Trace) -> bool:
        return trace.num_turns == 1 and "enough" in trace.last_reply

    @vf.reward
    async def told(self, trace: vf.Trace, runtime: vf.Runtime) -> float:
        if self.data.name == "reward":
            raise RuntimeError("the judge is ill")
        return float(trace.info["told"] == "before" and trace.stop_condition == "enough")


class Hooked(vf.Taskset[HookedTask, HookedConfig]):
    def load(self):
        for n in range(20):
            yield HookedTask(SumData(prompt=f"{n}?", answer="", name=self.config.broken), self.config.task)
