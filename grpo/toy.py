"""Groups written by hand, without a model: what a loss is tried on before a run, and what tests are made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from grpo.types import Completion, FinishReason, Group, Problem, Rollout, Score


def toy_group(
    name: str,
    rewards: Sequence[float],
    lengths: Sequence[int],
    *,
    logprobs: Sequence[Sequence[float]] = (),
    truncated: Sequence[bool] = (),
    parts: Sequence[Mapping[str, float]] = (),
) -> Group:
    """One completion a reward: ``toy_group("a", [1, 0], [3, 5])`` has a right one of three tokens and a wrong one of five.

    Args:
        logprobs: of each completion's tokens under the engine; −1 where not given.
        truncated: whether the token limit cut it off; no where not given.
        parts: values by reward part; none where not given.
    """
    problem = Problem(id=name, prompt="?", answer="1")

    def rollout(i: int, reward: float, length: int) -> Rollout:
        completion = Completion(
            problem_id=name,
            index=i,
            prompt_ids=(1,),
            token_ids=(7,) * length,
            text="",
            logprobs=tuple(logprobs[i]) if logprobs else (-1.0,) * length,
            policy_versions=(0,) * length,
            finish_reason=FinishReason.length if truncated and truncated[i] else FinishReason.stop,
        )
        scores = {part: Score(value=value) for part, value in parts[i].items()} if parts else {}
        return Rollout(problem=problem, completion=completion, scores=scores, reward=reward)

    return Group(problem=problem, rollouts=tuple(rollout(i, r, n) for i, (r, n) in enumerate(zip(rewards, lengths, strict=True))))
