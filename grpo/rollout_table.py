"""Groups of rollouts ↔ a table with one row a rollout: what the parquet files of a run hold."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from grpo.types import Completion, FinishReason, Group, Outcome, Problem, Rollout, Score

if TYPE_CHECKING:
    import pyarrow as pa

RolloutKey = tuple[str, int]  # (problem id, index of the completion): names a rollout within one step


def rollout_table(
    step: int,
    groups: Sequence[Group],
    advantages: Mapping[RolloutKey, float],
    extra: Mapping[str, Mapping[RolloutKey, Any]],
) -> pa.Table:
    """Rollouts → a table: fixed columns, then four a reward part (``score/…``, ``outcome/…``, ``detail/…``, ``tags/…``), then ``extra``.

    The types are written out, not inferred: an empty list or a step without one truncated rollout must not change the schema.
    """
    import pyarrow as pa

    rollouts = [rollout for group in groups for rollout in group.rollouts]
    parts = list(dict.fromkeys(part for rollout in rollouts for part in rollout.scores))
    columns: dict[str, pa.Array] = {
        "step": pa.array([step] * len(rollouts), pa.int64()),
        "problem_id": pa.array([r.problem.id for r in rollouts], pa.string()),
        "group": pa.array([r.problem.id for r in rollouts], pa.string()),
        "index": pa.array([r.completion.index for r in rollouts], pa.int32()),
        "prompt": pa.array([_utf8(r.problem.prompt) for r in rollouts], pa.string()),
        "question": pa.array([_utf8(r.problem.question) for r in rollouts], pa.string()),
        "answer": pa.array([_utf8(r.problem.answer) for r in rollouts], pa.string()),
        "completion": pa.array([_utf8(r.completion.text) for r in rollouts], pa.string()),
        "transcript": pa.array([_pieces(r.completion) for r in rollouts], _piece_lists()),
        "prompt_ids": pa.array([r.completion.prompt_ids for r in rollouts], pa.list_(pa.int32())),
        "token_ids": pa.array([r.completion.token_ids for r in rollouts], pa.list_(pa.int32())),
        "behavior_logprobs": pa.array([r.completion.logprobs for r in rollouts], pa.list_(pa.float32())),
        "kept": pa.array([r.completion.kept for r in rollouts], pa.list_(pa.binary())),
        "policy_versions": pa.array([r.completion.policy_versions for r in rollouts], pa.list_(pa.int32())),
        "sampled": pa.array([r.completion.sampled for r in rollouts], pa.list_(pa.bool_())),
        "finish_reason": pa.array([str(r.completion.finish_reason) for r in rollouts], pa.string()),
        "reward": pa.array([r.reward for r in rollouts], pa.float64()),
        "advantage": pa.array([advantages.get(rollout_key(r)) for r in rollouts], pa.float64()),
        "columns": pa.array([text for group in groups for text in _columns(group)], pa.string()),
    }
    for part in parts:
        scores = [r.scores.get(part) for r in rollouts]
        columns[f"score/{part}"] = pa.array([s.value if s else None for s in scores], pa.float64())
        columns[f"outcome/{part}"] = pa.array([str(s.outcome) if s else None for s in scores], pa.string())
        columns[f"detail/{part}"] = pa.array([_utf8(s.detail) if s else None for s in scores], pa.string())
        columns[f"tags/{part}"] = pa.array([tuple(map(_utf8, s.tags)) if s else () for s in scores], pa.list_(pa.string()))
    for column, values in extra.items():
        if column in columns:
            raise ValueError(f"extra column {column!r} is a column already: give it another name")
        columns[column] = pa.array([values.get(rollout_key(r)) for r in rollouts])
    return pa.table(columns)


def rollout_key(rollout: Rollout) -> RolloutKey:
    return rollout.problem.id, rollout.completion.index


def groups_of(table: pa.Table) -> tuple[Group, ...]:
    """The groups that ``rollout_table`` was given, in their order; a column that JSON cannot hold comes back as its text."""
    by_problem: dict[str, list[Rollout]] = {}
    columns: dict[str, Any] = {}
    for row in table.to_pylist():
        name = row["problem_id"]
        if row["columns"] is not None:
            columns[name] = json.loads(row["columns"])
        by_problem.setdefault(name, []).append(_rollout(row, columns[name]))
    return tuple(Group(problem=rollouts[0].problem, rollouts=tuple(rollouts)) for rollouts in by_problem.values())


def parts_of(row: Mapping[str, Any]) -> dict[str, Score]:
    """The scores of a row by reward part; a part that was not asked for this rollout is left out."""
    names = [column.removeprefix("outcome/") for column in row if column.startswith("outcome/")]
    return {
        name: Score(
            value=math.nan if row[f"score/{name}"] is None else row[f"score/{name}"],
            outcome=Outcome(row[f"outcome/{name}"]),
            detail=row[f"detail/{name}"],
            tags=tuple(row[f"tags/{name}"]),
        )
        for name in names
        if row[f"outcome/{name}"] is not None
    }


def _columns(group: Group) -> list[str | None]:
    """The problem's columns as JSON with the first rollout of a group, null with the others: a problem's tests may be megabytes."""
    text = _utf8(json.dumps(dict(group.problem.columns), default=str, ensure_ascii=False))
    return [text if i == 0 else None for i in range(len(group.rollouts))]


def _rollout(row: Mapping[str, Any], columns: Mapping[str, Any]) -> Rollout:
    return Rollout(
        problem=Problem(
            id=row["problem_id"],
            prompt=row["prompt"],
            question=row.get("question", row["prompt"]),  # a run of an older version has no such column
            answer=row["answer"],
            columns=columns,
        ),
        completion=Completion(
            problem_id=row["problem_id"],
            index=row["index"],
            prompt_ids=tuple(row["prompt_ids"]),
            token_ids=tuple(row["token_ids"]),
            text=row["completion"],
            logprobs=tuple(row["behavior_logprobs"]),
            policy_versions=tuple(row["policy_versions"]),
            finish_reason=FinishReason(row["finish_reason"]),
            sampled=tuple(row.get("sampled") or ()),
            transcript=tuple((piece["text"], piece["own"]) for piece in row.get("transcript") or ()),
            kept=tuple(row.get("kept") or ()),  # nor this one
        ),
        scores=parts_of(row),
        reward=math.nan if row["reward"] is None else row["reward"],
    )


def _pieces(completion: Completion) -> list[dict[str, Any]]:
    return [{"text": _utf8(text), "own": own} for text, own in completion.transcript]


def _piece_lists() -> pa.DataType:
    """Pieces of text in order, and whether the policy wrote each; empty where ``completion`` is all there is."""
    import pyarrow as pa

    return pa.list_(pa.struct([("text", pa.string()), ("own", pa.bool_())]))


def _utf8(text: str) -> str:
    """Lone surrogates, which a tokenizer may emit, have no UTF-8 form and parquet refuses them: show them as escapes."""
    return text.encode("utf-8", "backslashreplace").decode()
