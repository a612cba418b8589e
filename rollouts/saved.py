"""A group in the making ↔ plain values, for checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from enum import Enum
from typing import Any

from grpo.config import ConfigError
from grpo.rollouts.assembly import GroupInMaking
from grpo.rollouts.base import Begun
from grpo.types import FAILURE, Completion, FinishReason, Outcome, Rollout, Score


def saved(group: GroupInMaking) -> dict[str, Any]:
    """What there is of a group. A conversation under way is left out: it begins anew, for an environment cannot be saved. What the rewards
    failed to score is scored again: they may have been repaired."""
    scored = {index: rollout for index, rollout in group.rollouts.items() if not _failed_to_score(rollout)}
    open_ones = [episode for episode in group.episodes if episode.index not in scored]
    own = {episode.index: sorted(episode.scores) for episode in group.episodes}
    return {
        "problem": group.problem.id,
        "asked": [group.problem.prompt, group.problem.answer],
        "draw": group.draw,
        "rollouts": {
            index: {
                "completion": _plain(rollout.completion),
                "scores": {name: _plain(score) for name, score in rollout.scores.items()},
                "own": own[index],  # those of its environment
                "reward": rollout.reward,
            }
            for index, rollout in scored.items()
        },
        "over": {
            episode.index: {"completion": _plain(episode.completion), "scores": {n: _plain(s) for n, s in episode.scores.items()}}
            for episode in open_ones
            if episode.completion is not None
        },
        "begun": {
            episode.index: {"prompt_ids": episode.prompt_ids, **_plain(episode.begun)}
            for episode in open_ones
            if episode.completion is None and episode.begun.token_ids and not episode.num_turns
        },
    }


def put_back(group: GroupInMaking, plain: Mapping[str, Any], *, as_judged: bool) -> None:
    """The reverse, into a group of which nothing is there yet. It may have more rollouts than it had, and not fewer.

    Args:
        as_judged: the rewards are those that it was scored by; otherwise what was scored is scored again.

    Raises:
        ConfigError: it has fewer, or its problem is another one by now.
    """
    if [group.problem.prompt, group.problem.answer] != plain["asked"]:
        what = f"problem {group.problem.id!r}, of which this run has begun a group ahead, is another one now"
        raise ConfigError("data.problems", what, "leave the data, and run.seed, as they were")
    indices = {*plain["rollouts"], *plain["over"], *plain["begun"]}
    if lost := indices - {episode.index for episode in group.episodes}:
        now = f"is {len(group.episodes)}, and this run has begun a group of {max(lost) + 1} or more"
        raise ConfigError("rollout.completions_per_problem", now, "leave it as it was, or raise it")
    for episode in group.episodes:
        if episode.index in plain["rollouts"]:
            rollout = plain["rollouts"][episode.index]
            completion, scores = _completion(rollout["completion"]), _scores(rollout["scores"])
            episode.completion, episode.scores = completion, {name: scores[name] for name in rollout["own"]}
            if as_judged:
                group.rollouts[episode.index] = Rollout(
                    problem=group.problem, completion=completion, scores=scores, reward=rollout["reward"]
                )
        elif episode.index in plain["over"]:
            over = plain["over"][episode.index]
            episode.completion, episode.scores = _completion(over["completion"]), _scores(over["scores"])
        elif episode.index in plain["begun"]:
            prompt_ids, begun = plain["begun"][episode.index]["prompt_ids"], dict(plain["begun"][episode.index])
            del begun["prompt_ids"]
            episode.go_on_behind(prompt_ids, Begun(**begun))


def _failed_to_score(rollout: Rollout) -> bool:
    """The grader's failure, not the environment's: that cannot be made up for."""
    return not rollout.scored and FAILURE not in rollout.scores


def _plain(value: Any) -> dict[str, Any]:
    return {f.name: str(v) if isinstance(v := getattr(value, f.name), Enum) else v for f in fields(value)}


def _completion(plain: Mapping[str, Any]) -> Completion:
    return Completion(**{**plain, "finish_reason": FinishReason(plain["finish_reason"])})


def _scores(plain: Mapping[str, Mapping[str, Any]]) -> dict[str, Score]:
    return {name: Score(**{**score, "outcome": Outcome(score["outcome"])}) for name, score in plain.items()}
