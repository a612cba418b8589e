"""The policy's weights → the engines, once a step: sent, proven (``grpo.rollouts.proof``), and held against the trainer on a probe.

The first time in a process – a resumed run's too – the whole way is tested with changes too large to miss. The trainer's side of that
is a snapshot of the policy: the policy itself is only looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from torch import Tensor

from grpo.batch import collate
from grpo.policy import Metrics, Policy
from grpo.rollouts.base import Engine, ServedEngine, SyncReport
from grpo.rollouts.proof import Passing, SelfTest, check_sent, probe_difference, self_test
from grpo.rollouts.weights import WeightStream
from grpo.types import Completion, Group, Problem, Request, Rollout, Sampling

_PROMPT = 80  # tokens of a probe's prompt: more than two blocks of a prefix cache (32 tokens on CPUs, 16 on GPUs), which must be dropped
_PROMPTS, _SAMPLES, _TOKENS = 2, 2, 4
_GAUGE = 8  # tokens of a prompt of the gauge, which is read at every sync


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """What engines and trainer are asked again and again."""

    requests: tuple[Request, ...]
    sampling: Sampling

    @property
    def gauge(self) -> Probe:
        """One token behind the last ones of the same prompts: read at every sync, it must cost little."""
        requests = (replace(request, prompt_ids=request.prompt_ids[-_GAUGE:]) for request in self.requests)
        return Probe(requests=tuple(requests), sampling=replace(self.sampling, max_new_tokens=1))

    @classmethod
    def of(cls, prompts: Sequence[Sequence[int]], room: int, temperature: float = 1.0) -> Probe:
        """The first different prompts of a data set, cut or repeated to the length that a probe needs.

        Args:
            room: tokens that fit into an engine, prompt and completion together.
            temperature: that of training, at which the policy scores.
        """
        length, tokens = max(1, min(_PROMPT, room - _TOKENS)), min(_TOKENS, room - 1)
        different = list(dict.fromkeys(_of_length(prompt, length) for prompt in prompts if prompt))[:_PROMPTS]
        requests = (
            Request(problem_id=f"probe {i}", prompt_ids=prompt, num_completions=_SAMPLES, seed=i) for i, prompt in enumerate(different)
        )
        return cls(requests=tuple(requests), sampling=Sampling(temperature=temperature, max_new_tokens=tokens))


def _of_length(prompt: Sequence[int], length: int) -> tuple[int, ...]:
    """The end of a prompt, which is what tells it from others; a short one again and again."""
    return tuple((list(prompt) * -(-length // len(prompt)))[-length:])


class WeightSync:
    """Gives the engines the policy's weights and does not return before that is proven.

    Args:
        snapshot: a copy of the policy that can be given other weights.
        probe: None for an engine without a model, whose log-probs are nobody's: the bytes are proven all the same.
        tell: is given what the self-test found.
    """

    def __init__(
        self, policy: Policy, snapshot: Callable[[], Policy], engine: Engine, probe: Probe | None, tell: Callable[[SelfTest], None]
    ) -> None:
        self._policy, self._snapshot, self._engine = policy, snapshot, engine
        self._probe, self._tell = probe, tell
        self.tested = probe is None

    def send(self, version: int) -> Metrics:
        """Load, prove, measure.

        Raises:
            WeightProofError: an engine does not hold, or does not compute with, what was sent.
        """
        if self._probe is None:
            return self._load(version).metrics()
        if self.tested:
            report, policy = self._load(version), self._policy
        else:  # the policy itself first scores what it is trained on: that is when its layout is tried
            policy = self._snapshot()
            score, weights = Rescored(policy), dict(WeightStream.of(self._policy.weights()))  # gathered once, sent often
            found = self_test(self._engine, weights, score, self._probe.requests, self._probe.sampling, version)
            score(weights, ())
            report, self.tested = found.report, True
            self._tell(found)
        gauge = self._probe.gauge
        apart = probe_difference(self._engine, lambda answers: logprobs(policy, answers), gauge.requests, gauge.sampling)
        return report.metrics() | {"sync/probe_logprob_diff": apart}

    def _load(self, version: int) -> SyncReport:
        """Load the policy's weights; what an engine in this process says it got is what was sent. A pool asks each of its own engines."""
        if not isinstance(self._engine, ServedEngine):
            return self._engine.load_weights(self._policy.weights(), version)
        stream, sent = WeightStream.of(self._policy.weights()), Passing()
        tensors = sent.passing(stream)
        report = self._engine.load_weights(WeightStream(stream.specs, tensors), version)
        for _ in tensors:
            """What it did not take was sent all the same."""
        check_sent(sent.digests, version, report, "the engine")
        return report


class Rescored:
    """A policy's log-probs under weights that are not its own. Meant for a snapshot: it keeps the last ones."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._rest = {name: value for name, value in policy.state().items() if name != "masters"}

    def __call__(self, weights: Mapping[str, Tensor], completions: Sequence[Completion]) -> list[list[float]]:
        self._policy.load_state({**self._rest, "masters": weights})
        return logprobs(self._policy, completions)


def logprobs(policy: Policy, completions: Sequence[Completion]) -> list[list[float]]:
    """The policy's, of every token of every completion."""
    if not completions:
        return []
    groups = [_group(name, tuple(some)) for name, some in groupby(completions, lambda completion: completion.problem_id)]
    scores = policy.score(collate(groups)).logprobs
    return [part.tolist() for part in scores.split([len(completion.token_ids) for completion in completions])]


def _group(name: str, completions: Sequence[Completion]) -> Group:
    problem = Problem(id=name, prompt="", answer="")
    rollouts = (Rollout(problem=problem, completion=completion, scores={}, reward=0.0) for completion in completions)
    return Group(problem=problem, rollouts=tuple(rollouts))
