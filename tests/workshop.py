"""Runs of one tiny recipe that are killed and gone on with, and what they are held against."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from grpo.run import RunFolder

from .killable_runs import Kill, Runs
from .tiny_runs import write_recipe

STEPS, SAVED_EVERY = 6, 2
ENGINES = {"hf": ("rollout=hf",), "scripted": ("rollout=scripted", "rollout.max_new_tokens=80")}
# A reward that tells a random model's completions apart; told to, it kills the trainer that asked.
REWARDS = '''
import os
import signal
from pathlib import Path

def digits(completion, problem):
    """The share of digits in the text."""
    order = Path({folder!r}) / f"kill {{problem.id.replace('/', ' ')}} {{completion.index}}"
    if order.exists():
        order.unlink()
        os.kill(os.getppid(), signal.SIGKILL)
    return sum(c.isdigit() for c in completion.text) / max(len(completion.text), 1)
'''


class Workshop:
    """Runs of one recipe, by name, and the uninterrupted one of each engine."""

    def __init__(self, folder: Path, model: str, runs: Runs) -> None:
        self.folder, self.runs, rewards = folder, runs, REWARDS.format(folder=str(folder))
        sections = {"run": {"steps": STEPS, "checkpoint_every": SAVED_EVERY}, "scoring": {"workers": 1}}
        self.recipe = write_recipe(folder, model, rewards=rewards, **sections)

    def path(self, name: str) -> Path:
        return self.folder / "runs" / "digits" / name

    def said(self) -> str:
        return self.runs.log.read_text()

    def train(self, name: str, *words: str, kill: Kill | None = None) -> int:
        return self.runs.run("train", self.recipe, f"run.name={name}", *words, kill=kill)

    def go_on(self, name: str, *words: str, kill: Kill | None = None) -> int:
        return self.runs.run("train", str(self.path(name)), *words, kill=kill)

    def whole(self, engine: str) -> RunFolder:
        name = f"whole_{engine}"
        if not self.path(name).exists():
            assert self.train(name, *ENGINES[engine]) == 0, self.said()
        return RunFolder.open(self.path(name))


def name_of(value: Any) -> str:
    return f"{value.phase} {value.call} at {value.share:.2f}" if isinstance(value, Kill) else str(value)
