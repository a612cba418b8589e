"""What the reward runtime and its workers say to each other: pickled messages, each behind its length."""

from __future__ import annotations

import pickle
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from grpo.rewards.base import RewardPart
from grpo.rewards.limits import RewardLimits
from grpo.types import Score

_LENGTH = struct.Struct("!Q")


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """Parent → worker, once: what to load and under which limits to run it, one of each a part."""

    parts: tuple[RewardPart, ...]
    limits: tuple[RewardLimits, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """Worker → parent, once: everything is loaded. ``timeout_values`` has one entry a part."""

    timeout_values: tuple[float, ...]
    cpu_clock: float  # seconds of CPU time the worker has used so far


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """Parent → worker, in tuples: score these completions – one, or a whole batch – by these parts, one after the other.

    The payload is pickled once and read in the worker's ``try``.
    """

    rows: tuple[int, ...]  # where the completions stand in the parent's call
    parts: tuple[int, ...]
    payload: bytes  # pickle of (completions, problems)


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """Worker → parent: one part of one job is done. The CPU clock is where the next task's time starts."""

    rows: tuple[int, ...]
    part: int
    scores: tuple[Score, ...]  # one a row
    seconds: float  # on the worker's clock, for all rows together
    cpu_clock: float
    exhausted: bool = False  # the task ran out of memory and left the worker with too little: replace it


def encode(message: Any) -> bytes:
    body = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
    return _LENGTH.pack(len(body)) + body


def decode(buffer: bytearray) -> Iterator[Any]:
    """The whole messages at the head of ``buffer``, which keeps the rest."""
    while len(buffer) >= _LENGTH.size:
        end = _LENGTH.size + _LENGTH.unpack_from(buffer)[0]
        if len(buffer) < end:
            return
        body = bytes(buffer[_LENGTH.size : end])
        del buffer[:end]
        yield pickle.loads(body)


def receive(channel: socket.socket) -> Any:
    """Wait for one message.

    Raises:
        EOFError: the other side is gone.
    """
    return pickle.loads(_read(channel, _LENGTH.unpack(_read(channel, _LENGTH.size))[0]))


def _read(channel: socket.socket, size: int) -> bytes:
    chunks = bytearray()
    while len(chunks) < size:
        chunk = channel.recv(min(size - len(chunks), 1 << 20))
        if not chunk:
            raise EOFError
        chunks += chunk
    return bytes(chunks)
