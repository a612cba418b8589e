"""What ``checkpoints/best`` is."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

BEST_FILE = "evaluation.json"  # in ``checkpoints/best``: what makes it the best


@dataclass(frozen=True, slots=True, kw_only=True)
class Best:
    """The best model by evaluation: the step it is of, its held-out pass@1, and what that rests on."""

    step: int
    score: float
    judge: Mapping[str, Any] = field(default_factory=dict, hash=False)  # as JSON has it; without a key: that is not known

    def judged_by(self, judge: Mapping[str, Any]) -> bool:
        """Whether a score of ``judge`` can be held against this one: whatever is known of both is the same."""
        return all(self.judge[name] == judge[name] for name in self.judge.keys() & judge.keys())

    def to_json(self) -> str:
        return json.dumps({"step": self.step, "eval/pass@1": self.score, "judge": self.judge}) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Best:
        """
        Raises:
            ValueError: the text is not what ``to_json`` gives.
        """
        try:
            record = json.loads(text)
            return cls(step=int(record["step"]), score=float(record["eval/pass@1"]), judge=dict(record.get("judge", {})))
        except (TypeError, KeyError) as error:
            raise ValueError(f"{text!r} is no record of a best model") from error

    def __str__(self) -> str:
        return f"the model of step {self.step} (held-out pass@1 {self.score:.2f})"
