"""The training loop. Everything it uses is a protocol or a pure function; ``grpo.build`` puts the real ones together.

How it differs from the R1 paper: one optimiser update a step by default (the paper: 16 a rollout phase), rollouts are scored
and collected by problem id, completions without signal cost no compute, and the sampler's own numerics are corrected for.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from grpo import checkpoint, randomness
from grpo.batch import Batch
from grpo.best import Best
from grpo.interrupt import StopSignal
from grpo.learner import Learner
from grpo.loggers import Logger
from grpo.metrics import eval_metrics, rollout_metrics, staleness_metrics
from grpo.rewards.health import RewardFailure, UnscoredStop
from grpo.rollout_table import rollout_key
from grpo.rollouts.dynamic import Draw, draw_groups
from grpo.run import RunFolder
from grpo.types import Group, Problem
from grpo.weight_sync import WeightSync

Metrics = dict[str, float]


class Collector(Protocol):
    """Where the groups of a step come from: ``grpo.rollouts.collect``, or ``grpo.rollouts.paced``, which samples ahead."""

    def take(self, count: int, besides: Collection[str] = ()) -> Sequence[Problem]:
        """The next problems but those with these ids, which the step has taken already; fewer where there are no others."""
        ...

    def collect(self, problems: Sequence[Problem], step: int) -> tuple[Group, ...]:
        """Their scored groups."""
        ...

    def used(self) -> None:
        """All that was taken is trained on."""
        ...

    def resting(self) -> AbstractContextManager[None]:
        """Meanwhile the engine is free for other work, such as new weights."""
        ...

    def metrics(self) -> Metrics: ...

    def state(self) -> dict[str, Any]:
        """For a checkpoint: the place in the data, and what was sampled and not yet trained on."""
        ...

    def load_state(self, state: Mapping[str, Any]) -> None: ...

    @property
    def timings(self) -> Metrics: ...


Evaluate = Callable[[int], tuple[Group, ...]]  # step → scored groups of all held-out problems


class Counts(Protocol):
    """An engine as the loop sees it."""

    def metrics(self) -> Metrics: ...

    def sleep(self) -> None:
        """Give its memory back until it is sent weights."""
        ...


@dataclass(kw_only=True)
class Settings:
    """The numbers the loop itself needs."""

    steps: int
    problems_per_step: int
    sampling_rounds: int = 1
    colocate: bool = False  # the engine is on the trainer's GPUs
    checkpoint_every: int = 10
    keep_checkpoints: int = 1
    eval_every: int = 10
    eval_metric: str = "accuracy"


@dataclass(kw_only=True)
class Trainer:
    """One run: its parts and its progress. ``train()`` is the loop."""

    settings: Settings
    run: RunFolder
    learner: Learner
    engine: Counts
    weights: WeightSync
    collector: Collector
    evaluator: Evaluate | None  # None: there is nothing held out
    reward_weights: dict[str, float]
    graders: UnscoredStop
    logger: Logger
    inputs: Mapping[str, Any]  # of this start, see ``grpo.inputs``; until the first update the run folder has those of the one before
    step: int = 0
    best: Best | None = None  # what ``checkpoints/best`` is
    elapsed: float = 0.0
    synced_version: int = -1
    times: Metrics = field(default_factory=dict)
    synced: Metrics = field(default_factory=dict)  # what was proven of the last weights that were sent
    row: Metrics = field(default_factory=dict)  # the metrics of the last step, as far as they are known

    def train(self, stop: StopSignal, begun: Callable[[], None]) -> None:
        """Go on until ``settings.steps``; on ``Interrupted`` what is done is saved before it travels on.

        Args:
            begun: called once, before the first update: nothing has been refused until then, and nothing trained.
        """
        s, started, before, whole = self.settings, time.monotonic(), self.elapsed, True
        try:
            self.make_up(stop)
            for step in range(first := self.step + 1, s.steps + 1):
                self.times, begin = {}, time.monotonic()
                with stop.anywhere():
                    self.sync()
                    drawn = self.draw(step)
                    self.make_room()
                self.check_graders(drawn.all, step)
                if step == first:
                    begun()
                whole = False  # from here on the policy may be half a step ahead
                with self.timed("update"):
                    batch, updates = self.learner.learn(drawn.kept, self.logger.phase)
                self.collector.used()
                self.step = step
                metrics = rollout_metrics(drawn.all, s.eval_metric, self.reward_weights) | updates | self.draw_metrics(drawn, batch)
                self.record(drawn, batch)
                whole = True  # and its rollouts are on disk
                try:
                    self.elapsed = before + time.monotonic() - started
                    self.row = metrics | self.progress(drawn.all, time.monotonic() - begin)
                    if step == s.steps or (s.checkpoint_every and step % s.checkpoint_every == 0):
                        self.save()  # before the evaluation: whatever happens there, the step is not lost
                    if self.evaluation_due():
                        metrics |= self.evaluate(stop)
                finally:  # the step is done: it is on record even if its evaluation was cut off
                    self.elapsed = before + time.monotonic() - started
                    self.row = metrics | self.progress(drawn.all, time.monotonic() - begin)
                    self.logger.log(step, self.row)
                stop.check()
        except BaseException as error:
            if whole and self.step and self.step not in checkpoint.steps(self.run):
                try:
                    self.save()
                except Exception as second:  # the first error says more
                    error.add_note(f"and step {self.step} could not be saved: {second}")
            raise

    def draw(self, step: int) -> Draw:
        """The groups of a step, with the weights the engine has."""

        def collect(problems: Sequence[Problem]) -> tuple[Group, ...]:
            groups = self.collector.collect(problems, step)
            for name, seconds in self.collector.timings.items():
                self.times[name] = self.times.get(name, 0.0) + seconds
            return groups

        s = self.settings
        return draw_groups(collect, self.collector.take, self.learner.has_signal, s.problems_per_step, s.sampling_rounds)

    def draw_metrics(self, drawn: Draw, batch: Batch) -> Metrics:
        """What was left out of the update, and why: counted, so that nothing is biased in silence."""
        metrics = {"rollout/drawn_groups": float(len(drawn.all)), "rollout/dropped_groups": float(len(drawn.dropped))}
        metrics |= staleness_metrics(batch.rollouts, self.step - 1)
        if self.learner.mask_truncated:
            metrics["rollout/masked_truncated"] = float(sum(r.completion.truncated for g in drawn.kept for r in g.rollouts))
        return metrics

    def check_graders(self, groups: Sequence[Group], step: int) -> None:
        """Stop when too much could not be scored; these rollouts, with the tracebacks, are stored all the same."""
        try:
            self.graders.check(groups)
        except RewardFailure:
            self.run.write_rollouts(step, groups)
            raise

    def sync(self) -> None:
        """Give the engine the policy's weights unless it has them. The version is the number of steps behind them."""
        if self.synced_version != self.step:
            with self.collector.resting(), self.timed("sync" if self.weights.tested else "self_test"):
                self.logger.phase("loading weights" if self.weights.tested else "testing how weights reach the engine")
                with self.handing_over():
                    self.synced = self.weights.send(version=self.step)
                self.synced_version = self.step

    def make_room(self) -> None:
        """On shared GPUs the engine, which has sampled what it will with these weights, sleeps until the next."""
        if self.settings.colocate:
            with self.timed("sleep"):
                self.logger.phase("putting the engine to sleep")
                self.engine.sleep()

    @contextmanager
    def handing_over(self) -> Iterator[None]:
        """On shared GPUs, what an update has cached goes back before the engine wakes, and what the sync has when it has ended."""
        if not self.settings.colocate:
            yield
            return
        self.learner.policy.empty_cache()
        yield
        self.learner.policy.empty_cache()

    def evaluation_due(self) -> bool:
        every = self.settings.eval_every
        return self.evaluator is not None and (self.step in (0, self.settings.steps) or bool(every and self.step % every == 0))

    def make_up(self, stop: StopSignal) -> None:
        """What the present step lacks: the evaluation at the start; or, stopped after its checkpoint, its evaluation and its row."""
        rows = self.run.read_metrics()
        if self.run.best_checkpoint.is_dir():
            if damage := checkpoint.damaged_model(self.run.best_checkpoint):
                self.logger.note(f"checkpoints/best is damaged ({damage}): it begins anew")
            else:
                self.best = self.run.read_best() or best_of(rows)
        if self.best and self.best.step > self.step and self.best.judged_by(self.judge()):
            self.logger.note(f"checkpoints/best stays {self.best} until it is beaten, though this run goes on from step {self.step}")
        recorded = next((row for row in rows if row["step"] == self.step), {})
        missing = self.evaluation_due() and "eval/pass@1" not in recorded
        if missing or (self.row and not recorded):
            whole = self.row | (self.evaluate(stop) if missing else {})
            whole |= {f"time/{name}": seconds for name, seconds in self.times.items()}
            self.run.drop_metrics(self.step)
            self.logger.log(self.step, whole)

    def evaluate(self, stop: StopSignal) -> Metrics:
        assert self.evaluator is not None
        with stop.anywhere():
            self.sync()
            with self.timed("eval"), self.collector.resting():
                groups = self.evaluator(self.step)
        metrics = eval_metrics(groups, self.settings.eval_metric) | self.synced | {"policy/version": float(self.synced_version)}
        self.run.write_rollouts(self.step, groups, folder="eval")
        here = Best(step=self.step, score=metrics["eval/pass@1"], judge=self.judge())
        if self.best and not self.best.judged_by(here.judge):
            self.logger.note(f"checkpoints/best was {self.best} by another reward, other problems or another eval.metric: it begins anew")
            self.best = None
        if self.best is None or here.score > self.best.score:
            checkpoint.save_best(self.run, self.learner.policy, here)
            self.best = here
        return metrics

    def judge(self) -> dict[str, Any]:
        """What an evaluation's score rests on beside the model, as far as it is known."""
        known = {"functions": self.inputs.get("functions"), "heldout": self.inputs.get("problems", {}).get("heldout")}
        return {"eval.metric": self.settings.eval_metric} | {name: digests for name, digests in known.items() if digests is not None}

    def record(self, drawn: Draw, batch: Batch) -> None:
        assert batch.advantages is not None
        first_tokens = torch.searchsorted(batch.rollout_index, torch.arange(len(batch.rollouts)))
        of_rollouts = batch.advantages[first_tokens].tolist()
        advantages = {rollout_key(r): advantage for r, advantage in zip(batch.rollouts, of_rollouts, strict=True)}
        dropped = {rollout_key(r): True for g in drawn.dropped for r in g.rollouts}
        kept = {rollout_key(r): False for g in drawn.kept for r in g.rollouts}
        self.run.write_rollouts(self.step, drawn.all, advantages, extra={"dropped": kept | dropped})
        self.logger.log_rollouts(self.step, drawn.all, advantages)

    def save(self) -> None:
        with self.timed("checkpoint"):
            self.logger.phase("saving")
            state = {
                "collector": self.collector.state(),
                "elapsed": self.elapsed,
                "learner": self.learner.state(),
                "graders": self.graders.state(),
                "row": self.row,
            }
            checkpoint.save(self.run, self.step, self.learner.policy, state, self.settings.keep_checkpoints)

    def restore(self, step: int) -> None:
        """Go on from the checkpoint of ``step``; call it last, for it restores the random states too."""
        state = checkpoint.load(self.run, step)
        self.learner.policy.load_state(state["policy"])
        self.step = state["step"]
        self.collector.load_state(state["collector"])
        self.elapsed = state["elapsed"]
        self.learner.load_state(state["learner"])
        self.graders.load_state(state["graders"])
        self.row = state["row"]
        randomness.restore(state["random"])

    def progress(self, groups: Sequence[Group], seconds: float) -> Metrics:
        tokens = sum(r.completion.num_sampled for g in groups for r in g.rollouts)
        times = {f"time/{name}": value for name, value in self.times.items()}
        return times | self.synced | self.engine.metrics() | self.collector.metrics() | {
            "time/step": seconds,
            "time/elapsed": self.elapsed,
            "throughput/problems_per_s": len(groups) / seconds,
            "throughput/tokens_per_s_generate": tokens / max(self.times.get("generate", seconds), 1e-9),
            "progress/steps": float(self.settings.steps),
            "policy/version": float(self.synced_version),
        }

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        start = time.monotonic()
        yield
        self.times[name] = self.times.get(name, 0.0) + time.monotonic() - start


def best_of(rows: Sequence[Mapping[str, float]]) -> Best | None:
    """The first of the highest evaluations: what ``checkpoints/best`` is in a run of a version that kept no record there."""
    evaluated = [Best(step=int(row["step"]), score=row["eval/pass@1"]) for row in rows if row.get("eval/pass@1", -1.0) >= 0]
    return max(evaluated, key=lambda best: best.score, default=None)
