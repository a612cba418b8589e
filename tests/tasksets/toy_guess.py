"""An Env of the taskset's own, in several turns: guess a number."""

import verifiers.v1 as vf
from toy_sums import SumData

__all__ = ["Guesses", "Guessing"]


class GuessConfig(vf.EnvConfig):
    player: vf.AgentConfig = vf.AgentConfig()


class Guessing(vf.Env[GuessConfig]):
    async def run(self, task, agents):
        async with agents.player.interaction(task) as game:
            said = await game.turn()
            while not said.terminated and said.last_reply != task.data.answer:
                said = await game.turn("higher" if int(said.last_reply) < int(task.data.answer) else "lower")

    async def finalize(self, task, episode):
        episode.traces[0].record_reward("speed", 1 / episode.traces[0].num_turns)


class GuessTask(vf.Task[SumData]):
    pass


class Guesses(vf.Taskset[GuessTask, vf.TasksetConfig]):
    def load(self):
        for n in range(20):
            yield GuessTask(SumData(prompt=f"Which number? ({n})", answer="7"), self.config.task)
