"""The training loop. Everything it uses is a protocol or a pure function; ``grpo.build`` puts the real ones together.

How it differs from the R1 paper: one optimiser update a step by default (the paper: 16 a rollout phase), rollouts are scored
and collected by problem id, completions without signal cost no compute, and the sampler's own numerics are corrected for.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from grpo import checkpoint
from grpo.batch import Batch
from grpo.data import ProblemSource
from grpo.interrupt import StopSignal
from grpo.learner import Learner
from grpo.loggers import Logger
from grpo.metrics import eval_metrics, has_signal, rollout_metrics
from grpo.rewards.health import RewardFailure, UnscoredStop
from grpo.rollout_table import rollout_key
from grpo.rollouts.base import SyncReport
from grpo.rollouts.dynamic import Draw, draw_groups
from grpo.run import RunFolder
from grpo.types import Group, Problem

Metrics = dict[str, float]


class Collector(Protocol):
    """Problems → scored groups, and the times it took."""

    def collect(self, problems: Sequence[Problem], step: int) -> tuple[Group, ...]: ...

    @property
    def timings(self) -> Metrics: ...


class TakesWeights(Protocol):
    """An engine as the loop sees it."""

    def load_weights(self, weights: Any, version: int) -> SyncReport: ...

    def metrics(self) -> Metrics: ...


@dataclass(kw_only=True)
class Settings:
    """The numbers the loop itself needs."""

    steps: int
    problems_per_step: int
    sampling_rounds: int = 1
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
    engine: TakesWeights
    collector: Collector
    evaluator: Collector
    source: ProblemSource
    heldout: Sequence[Problem]
    reward_weights: dict[str, float]
    graders: UnscoredStop
    logger: Logger
    step: int = 0
    best: float = -1.0
    elapsed: float = 0.0
    synced_version: int = -1
    times: Metrics = field(default_factory=dict)
    synced: Metrics = field(default_factory=dict)  # what was proven of the last weights that were sent

    def train(self, stop: StopSignal) -> None:
        """Go on until ``settings.steps``; on ``Interrupted`` what is done is saved before it travels on."""
        s, started, before, whole = self.settings, time.monotonic(), self.elapsed, True
        try:
            if self.evaluation_due() and not self.evaluated():  # at the start; or cut off when the run was stopped
                self.logger.log(self.step, self.evaluate(stop))
            for step in range(self.step + 1, s.steps + 1):
                self.times, begin, position = {}, time.monotonic(), self.source.position
                try:
                    with stop.anywhere():
                        self.sync()
                        drawn = self.draw(step)
                    self.check_graders(drawn.all, step)
                except BaseException:
                    self.source.position = position  # these problems were not trained on: resume draws them again
                    raise
                whole = False  # from here on the policy may be half a step ahead
                with self.timed("update"):
                    batch, updates = self.learner.learn(drawn.kept, self.logger.phase)
                self.step, whole = step, True
                metrics = rollout_metrics(drawn.all, s.eval_metric, self.reward_weights) | updates | self.draw_metrics(drawn)
                try:
                    self.record(drawn, batch)
                    self.elapsed = before + time.monotonic() - started
                    if step == s.steps or (s.checkpoint_every and step % s.checkpoint_every == 0):
                        self.save()  # before the evaluation: whatever happens there, the step is not lost
                    if self.evaluation_due():
                        metrics |= self.evaluate(stop)
                finally:  # the step is done: it is on record even if its evaluation was cut off
                    self.elapsed = before + time.monotonic() - started
                    self.logger.log(step, metrics | self.progress(drawn.all, time.monotonic() - begin))
                stop.check()
        except BaseException:
            if whole and self.step and self.step not in checkpoint.steps(self.run):
                self.save()
            raise

    def draw(self, step: int) -> Draw:
        """The groups of a step, with the weights the engine has."""

        def collect(problems: Sequence[Problem]) -> tuple[Group, ...]:
            groups = self.collector.collect(problems, step)
            for name, seconds in self.collector.timings.items():
                self.times[name] = self.times.get(name, 0.0) + seconds
            return groups

        return draw_groups(collect, self.source.take, self.has_signal, self.settings.problems_per_step, self.settings.sampling_rounds)

    def has_signal(self, group: Group) -> bool:
        """Where advantages are taken part by part, one part that differs is enough."""
        parts = self.learner.credit.part_weights
        return any(has_signal(group, part) for part in parts) if parts else has_signal(group)

    def draw_metrics(self, drawn: Draw) -> Metrics:
        """What was left out of the update, and why: counted, so that nothing is biased in silence."""
        metrics = {"rollout/drawn_groups": float(len(drawn.all)), "rollout/dropped_groups": float(len(drawn.dropped))}
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
            with self.timed("sync"):
                self.logger.phase("loading weights")
                self.synced = self.engine.load_weights(self.learner.policy.weights(), version=self.step).metrics()
                self.synced_version = self.step

    def evaluation_due(self) -> bool:
        every = self.settings.eval_every
        return bool(self.heldout) and (self.step in (0, self.settings.steps) or bool(every and self.step % every == 0))

    def evaluated(self) -> bool:
        return any(row.get("step") == self.step and "eval/pass@1" in row for row in self.run.read_metrics())

    def evaluate(self, stop: StopSignal) -> Metrics:
        with stop.anywhere():
            self.sync()
            with self.timed("eval"):
                groups = self.evaluator.collect(self.heldout, self.step)
        metrics = eval_metrics(groups, self.settings.eval_metric)
        self.run.write_rollouts(self.step, groups, folder="eval")
        if metrics["eval/pass@1"] > self.best:
            checkpoint.save_model(self.learner.policy, self.run.best_checkpoint)
            self.best = metrics["eval/pass@1"]
        return metrics

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
                "position": self.source.position,
                "elapsed": self.elapsed,
                "learner": self.learner.state(),
                "graders": self.graders.state(),
            }
            checkpoint.save(self.run, self.step, self.learner.policy, state, self.settings.keep_checkpoints)

    def restore(self, step: int) -> None:
        """Go on from the checkpoint of ``step``."""
        state = checkpoint.load(self.run, step)
        self.learner.policy.load_state(state["policy"])
        self.step, self.source.position = state["step"], state["position"]
        self.elapsed = state["elapsed"]
        self.learner.load_state(state["learner"])
        self.graders.load_state(state["graders"])
        self.best = max((row["eval/pass@1"] for row in self.run.read_metrics() if row.get("eval/pass@1", -1.0) >= 0), default=-1.0)

    def progress(self, groups: Sequence[Group], seconds: float) -> Metrics:
        tokens = sum(len(r.completion.token_ids) for g in groups for r in g.rollouts)
        times = {f"time/{name}": value for name, value in self.times.items()}
        return times | self.synced | self.engine.metrics() | {
            "time/step": seconds,
            "time/elapsed": self.elapsed,
            "throughput/problems_per_s": len(groups) / seconds,
            "throughput/tokens_per_s_generate": tokens / max(self.times.get("generate", 0.0), 1e-9),
            "progress/steps": float(self.settings.steps),
            "policy/version": float(self.synced_version),
        }

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        start = time.monotonic()
        yield
        self.times[name] = self.times.get(name, 0.0) + time.monotonic() - start
