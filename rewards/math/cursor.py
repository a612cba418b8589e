"""The place of a parser in its tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from grpo.rewards.math.limits import MAX_NESTING, NotUnderstood, TooLarge
from grpo.rewards.math.tokens import Token

_T = TypeVar("_T")


class Cursor:
    def __init__(self, tokens: tuple[Token, ...]) -> None:
        self._tokens = list(tokens)
        self._position = 0
        self._depth = 0

    @property
    def next(self) -> Token:
        return self._tokens[self._position]

    def _peek(self, ahead: int = 1) -> Token:
        return self._tokens[min(self._position + ahead, len(self._tokens) - 1)]

    def _take(self) -> Token:
        token = self.next
        self._position += token.kind != "end"
        return token

    def _at(self, *texts: str) -> bool:
        return self.next.kind in ("sign", "name", "word") and self.next.text in texts

    def _accept(self, *texts: str) -> str | None:
        return self._take().text if self._at(*texts) else None

    def _expect(self, *texts: str) -> str:
        if not self._at(*texts):
            raise NotUnderstood(f"{self.next.text!r} stands where {texts[0]!r} was expected")
        return self._take().text

    def _nested(self, rule: Callable[[], _T]) -> _T:
        self._depth += 1
        if self._depth > MAX_NESTING:
            raise TooLarge(f"nested more than {MAX_NESTING} deep")
        value = rule()
        self._depth -= 1
        return value

    @property
    def _last(self) -> Token:
        """The token taken last."""
        return self._tokens[max(self._position - 1, 0)]
